"""The nnx modules of the model families, and their common parts.

A decoder is a `language_model.LanguageModel`. It is independent of file formats (`families`) and adapters (`lora`).
"""
