"""Text becomes rows of tokens, once; rows become batches.

    sources -> tokenizers -> rows -> pipeline
    documents  ids           cache   batches

`sources` reads documents one at a time, `tokenizers` turns text into ids, `chat` a prompt and its answer by the model's
own template, `encode` each document by one of the two; `rows` packs or pads them into rows of T positions in the cache,
`pipeline` shuffles and batches the rows, `ngram` scores the held-out ones by counting.
`numbers` holds examples without tokens, for models that are not language models: each is a row.
"""
