"""Data: documents become rows of tokens once, and rows become batches. No jax is imported until batches are made.

    sources        where documents come from, one file each; its docstring is the page on adding one
    formats        files of rows in common formats, and what their columns mean
    tokenizers     text to ids and back
    chat_template  the sandbox in which chat templates run
    guarded_chat   messages rendered with a chat template, without control tokens that a content spells out
    template_checks  what a chat template changes or leaves out
    control_names  control tokens that a content spells out
    chat           token ids of prompts and answers
    conversations  token ids of conversations of several turns, and which of them are learned
    turn_spans     the characters of a turn in a rendered conversation
    rendered_text  the tokens of a rendered conversation, and which of them overlap given characters
    encode         token ids of a document, and which of them are learned
    records        pairs (token, next token) as arrays, records and batches; the prompt is masked out of the loss here
    examples       the same for numeric examples
    documents      the documents of held-out rows, and their two halves
    source_writer  writes the rows of a source, in batches of documents
    row_writer     packs documents into rows (sequence packing), or pads them
    row_counts     sizes of the written rows
    duplicates     counts of documents that occur more than once
    text_checks    signs in texts that something went wrong before
    best_fit       which documents share a row
    split_writer   the file of records of a split
    truncation     counts of what is cut off at the end of a row
    rows           the cache of packed rows, and the key of an entry
    not_learned    counts of the data that a run does not learn, by reason
    pipeline       batches of rows: order, epochs, threads
    ngram          the held-out loss of a bigram model
    source_checks  problems of sources, for the first stage of checks

Models and losses do not belong here.
"""
