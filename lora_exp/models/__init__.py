"""Language models as flax NNX modules, their weights, and conversion from and to published formats.

    families/     one file per family: tables, no jax. Its `__init__.py` explains how to add a family
    modules/      the nnx modules of the families
    weights/      checkpoints: locating, loading and writing, in several formats
    registry      families by name
    factory       models with random weights, or with shapes only
    tensor_names  names of tensors in checkpoints, in both directions
    config_table, config_rules, hf_config, hf_export    config.json, in both directions

Adapters (`lora`), meshes and shardings (`runtime.mesh`), tokenizers (`data`) and the loss (`train`) do not belong here.
Importing this package, the families, the registry, `hf_config` or `weights.locate` does not import jax.
"""
