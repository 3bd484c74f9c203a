"""Data: documents become rows of tokens once, and rows become batches. No jax is imported until batches are made.

    sources        where documents come from, one file each; its docstring is the page on adding one
    formats        files of rows in common formats, and what their columns mean
    tokenizers     text to ids and back
    chat           prompts and answers rendered with a model's chat template
    encode         token ids of a document: its prompt and its text
    records        pairs (token, next token) as arrays, records and batches; the prompt is masked out of the loss here
    examples       the same for numeric examples
    row_writer     packs documents into rows (sequence packing), or pads them
    best_fit       which documents share a row
    split_writer   the file of records of a split
    beyond_row     counts of what is cut off at the end of a row
    rows           the cache of packed rows, and the key of an entry
    unlearned      counts of what the data has and a run does not learn
    pipeline       batches of rows: order, epochs, threads
    ngram          the held-out loss of a bigram model
    source_checks  problems of sources, for the first stage of checks

Models and losses do not belong here.
"""
