"""Checkpoints of base weights: safetensors, GGUF of Llama, and Gemma's orbax; read into shardings, and written.

    locate        what `model.weights` means: a path, a package, a hub id; and the kind of checkpoint there. No jax
    store         loading into a model's arrays, saving, digests
    hf_writer     a model as Hugging Face's directory
    *_checkpoint  one file for each format, all of them a `stored_tensor.Checkpoint`

Adapter files belong to `lora.peft`, training checkpoints to `train`, tokenizer files to `data`.
"""
