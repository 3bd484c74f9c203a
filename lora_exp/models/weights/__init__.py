"""Checkpoints of base weights: safetensors, GGUF and orbax (Gemma); sharded loading, and writing.

    locate          resolves `model.weights` (a path, a package, a hub id) and detects the format. No jax
    store           loading into a model's arrays, saving, digests
    unused_tensors  checks of stored tensors that are not loaded
    gguf_config     the architecture of a GGUF file as config.json. No jax
    hf_writer       writes a model as a Hugging Face directory
    *_checkpoint    one file per format; each implements `stored_tensor.Checkpoint`. The dequantising one wraps another
    quantised_tensors  quantised tensors of other libraries as floating point

Adapter files are in `lora.peft_files`, training checkpoints in `train`, tokenizer files in `data`.
"""
