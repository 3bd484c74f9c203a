"""Checkpoints of base weights: safetensors, GGUF (Llama) and orbax (Gemma); sharded loading, and writing.

    locate        resolves `model.weights` (a path, a package, a hub id) and detects the format. No jax
    store         loading into a model's arrays, saving, digests
    hf_writer     writes a model as a Hugging Face directory
    *_checkpoint  one file per format; each implements `stored_tensor.Checkpoint`

Adapter files are in `lora.peft`, training checkpoints in `train`, tokenizer files in `data`.
"""
