"""Files for programs that serve an adapter (llama.cpp, Ollama, MLX, vLLM, transformers), and the check of what they do.

`exports` writes them. `answer_card` records what the adapted model answers; `diagnosis` compares a server with that.
"""
