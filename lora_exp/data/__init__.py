"""Data: documents become rows of tokens once, and rows become batches. No jax is imported until batches are made.

    documents      what a source yields: a document, a conversation, or a row that cannot be used
    sources        where documents come from, one file each; its docstring explains how to add one
    formats        files of rows in common formats, and what their columns mean
    tokenization   text to ids and back
    chats          conversations: chat templates, the tokens of each turn, and what a template leaves out
    encoding       documents to rows of tokens: encoding, packing, splitting, and the files of rows
    rows           the cache of packed rows, and the key of an entry
    document_rows  the documents of held-out rows, and their two halves
    pipeline       batches of rows: order, epochs, threads
    not_learned    counts of the data that a run does not learn, by reason
    text_checks    signs of earlier mistakes in texts, such as lost characters
    source_checks  problems of sources, for the first stage of checks
    prompts        files of prompts
    ngram          the held-out loss of a bigram model
    python_text    code and docstrings of Python files

Models and losses do not belong here.
"""
