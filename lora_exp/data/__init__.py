"""Data: documents become rows of tokens once, and rows become batches. No jax is imported until batches are made.

    sources        where documents come from, one file each; its docstring is the page on adding one
    tokenizers     text to ids and back
    chat           prompts and answers by a model's chat template
    encode         a document's ids: what is read, and what is learned
    records        pairs (token, next token) as arrays, records and batches; `examples` is the same for numbers
    rows           the rows of a source in the cache, and the key that names them; `row_writer` writes them
    pipeline       rows become batches: order, epochs, threads
    ngram          the held-out loss of a bigram model
    source_checks  problems of sources, for the first stage of checks

Models, losses and what is done with a batch do not belong here.
"""
