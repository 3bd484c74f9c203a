"""Data: documents become rows of tokens once, and rows become batches. No jax is imported until batches are made.

    sources        where documents come from, one file each; its docstring is the page on adding one
    formats        files of rows in common formats, and what their columns mean
    tokenizers     text to ids and back
    chat           messages rendered with a model's chat template, and encoded
    chat_template  the sandbox in which chat templates run
    conversations  token ids of conversations of several turns, and which of them are learned
    encode         token ids of a document, and which of them are learned
    records        pairs (token, next token) as arrays, records and batches; the prompt is masked out of the loss here
    examples       the same for numeric examples
    documents      the documents of held-out rows, and their two halves
    row_writer     packs documents into rows (sequence packing), or pads them
    best_fit       which documents share a row
    split_writer   the file of records of a split
    truncation     counts of what is cut off at the end of a row
    rows           the cache of packed rows, and the key of an entry
    unlearned      counts of the data that a run does not learn, by reason
    pipeline       batches of rows: order, epochs, threads
    ngram          the held-out loss of a bigram model
    source_checks  problems of sources, for the first stage of checks

Models and losses do not belong here.
"""
