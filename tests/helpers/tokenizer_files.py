"""Small synthetic tokenizers of every kind, in the formats of published checkpoints."""

import io
import json
from pathlib import Path

from hypothesis import strategies as st

LINES = ["Once upon a time there was a cat, and it sat.", "The cat's hat was red; 12 hats!", "a b c d e f g h i"] * 40
CHATML = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
ODD = st.text() | st.text(alphabet=" \n\ta1é<|im_start|end>s/½😀\u0301\u00a0", max_size=30)


def user(content: str) -> list[dict[str, str]]:
  return [{"role": "user", "content": content}]


def byte_level(folder: Path, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), added=(), **settings) -> Path:
  """A directory with a byte-level tokenizer.json, as GPT-2's and Llama 3's are, and its tokenizer_config.json."""
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.train_from_iterator(LINES, trainers.BpeTrainer(
    vocab_size=320, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False))
  made.add_tokens([AddedToken(token, special=False) for token in added])
  folder.mkdir(exist_ok=True, parents=True)
  made.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **settings}))
  return folder


def spaced(folder: Path, scheme: str = "first", **settings) -> Path:
  """A directory with a tokenizer.json that prepends a space to a text, like those of Llama 2 and Mistral."""
  from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

  made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
  if scheme == "normalizer":
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  else:
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
  made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                    decoders.Strip(" ", 1, 0)])
  made.train_from_iterator([word for line in LINES for word in line.split()], trainers.BpeTrainer(
    vocab_size=400, show_progress=False,
    special_tokens=["<unk>", "<s>", "</s>", "[INST]", "[/INST]", *(f"<0x{b:02X}>" for b in range(256))]))
  description = json.loads(made.to_str())
  bos = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": False, "rstrip": False,
         "single_word": False}
  description["added_tokens"] = description["added_tokens"][:5]  # bytes are no special tokens
  folder.mkdir(exist_ok=True, parents=True)
  (folder / "tokenizer.json").write_text(json.dumps(description))
  (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": bos, **settings}))
  return folder


def sentencepiece_model(folder: Path, dummy_prefix: bool = False, **settings) -> Path:
  """A directory with a tokenizer.model, by default as Gemma's: no space first, turns and line breaks user-defined."""
  import sentencepiece

  out = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(LINES), model_writer=out, vocab_size=320, model_type="bpe", byte_fallback=True,
    user_defined_symbols=["<start_of_turn>", "<end_of_turn>", "\n\n", "<b>"], normalization_rule_name="identity",
    remove_extra_whitespaces=False, hard_vocab_limit=False, add_dummy_prefix=dummy_prefix, minloglevel=2,
    allow_whitespace_only_pieces=True, **settings)
  folder.mkdir(exist_ok=True, parents=True)
  (folder / "tokenizer.model").write_bytes(out.getvalue())
  return folder


def gpt2_files(folder: Path) -> Path:
  """`folder` with vocab.json and merges.txt in place of its tokenizer.json."""
  model = json.loads((folder / "tokenizer.json").read_text())["model"]
  (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
  (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
  (folder / "tokenizer.json").unlink()
  return folder


def gguf_file(folder: Path, pre: str, **settings) -> Path:
  """A GGUF file with the vocabulary of `folder`'s byte-level tokenizer.json; <think> is user-defined in it."""
  import gguf

  description = json.loads((folder / "tokenizer.json").read_text())
  ids = {**description["model"]["vocab"], **{token["content"]: token["id"] for token in description["added_tokens"]}}
  special = {token["content"]: token["special"] for token in description["added_tokens"]}
  tokens = sorted(ids, key=ids.__getitem__)
  writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
  writer.add_tokenizer_model(settings.pop("model", "gpt2"))
  writer.add_tokenizer_pre(pre)
  writer.add_token_list(tokens)
  writer.add_token_types([{True: 3, False: 4}[special[token]] if token in special else 1 for token in tokens])
  writer.add_token_merges([" ".join(pair) for pair in settings.pop("merges", description["model"]["merges"])])
  for name, i in {"bos": 1, "eos": 2, **settings}.items():
    writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    write()
  return folder / "model.gguf"


def library_ids(folder: Path, text: str) -> list[int]:
  """The ids of the library itself for a text that contains the names of control tokens."""
  from tokenizers import Tokenizer as Library

  return Library.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
