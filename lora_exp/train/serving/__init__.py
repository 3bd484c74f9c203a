"""Files for programs that serve an adapter (llama.cpp, Ollama, MLX, vLLM, transformers), and a check of their answers.

`exports` writes them. `answer_card` records what the adapted model answers; `diagnosis` compares a server with that.
"""
