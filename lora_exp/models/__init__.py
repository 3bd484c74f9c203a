"""Language models as flax NNX modules, their weights, and how others publish both.

    families/     a file for each family: tables, no jax. How to add one is written in its `__init__.py`
    modules/      the nnx modules that compute families
    weights/      checkpoints: where they are, what formats there are, loading and writing
    registry      families by name
    factory       models with random weights, or with shapes alone
    tensor_names  how checkpoints name tensors, in both directions
    config_table, config_rules, hf_config, hf_export    config.json, in both directions

Does not belong here: adapters (`lora`), meshes and shardings (`runtime.mesh`), tokenizers (`data`), and the loss
(`train`). A model knows none of them. Importing this package, the families, the registry, `hf_config` or
`weights.locate` imports no jax.
"""
