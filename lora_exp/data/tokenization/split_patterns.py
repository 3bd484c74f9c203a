"""The patterns with which byte-level tokenizers split a text before merging, by their names in GGUF files."""

from tiktoken_ext.openai_public import r50k_pat_str

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
# Single digits, then GPT-2's pattern. Whitespace before a digit is split as at the end of the text.
SMOLLM = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s"
PATTERNS = {  # tokenizer.ggml.pre -> pattern
  **dict.fromkeys(("gpt-2", "phi-2", "olmo"), r50k_pat_str),
  **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"), LLAMA3),
  **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), QWEN2),
  **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), SMOLLM),
}
