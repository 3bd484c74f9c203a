"""Hydra's plugins: thin classes that connect Hydra with the session and with `lora_exp.sweep`. Imports no jax."""
