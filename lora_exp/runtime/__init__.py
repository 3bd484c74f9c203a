"""Code that is independent of models and data: console, cache, files and locks of run directories, device mesh.

The only package of lora_exp imported here is `config`.
"""
