"""The nnx modules that compute model families, and the parts that they share.

A decoder is a `language_model.LanguageModel`. It knows its sizes and its arrays, and neither file formats nor adapters:
those are tables in `families`, and `lora`.
"""
