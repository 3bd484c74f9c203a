"""Tokenizers in GGUF files that tiktoken cannot run: sentencepiece models, and ids that are not in merge order."""

import json

import pytest
from tokenizer_files import LINES, byte_level, gguf_file, sentencepiece_model

from lora_exp.config import InputError
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.data.tokenization.save import save_tokenizer

TEXTS = [*LINES[:3], "  two  spaces", "é 😀 \n\n x", "12 hats", "a<b>c", "<s> and </s>", ""]


def sentencepiece_gguf(folder, adds_space):
  """A GGUF file with the pieces of a sentencepiece model, and the directory of that model."""
  import gguf
  import sentencepiece

  model = sentencepiece_model(folder / "model", dummy_prefix=adds_space)
  pieces = sentencepiece.SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
  ids = range(len(pieces))
  kinds = [2 if pieces.is_unknown(i) else 3 if pieces.is_control(i) else 6 if pieces.is_byte(i) else 1 for i in ids]
  symbols = ["<start_of_turn>", "<end_of_turn>", "\n\n", "<b>"]
  tokens = [pieces.id_to_piece(i) for i in ids]
  writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
  writer.add_tokenizer_model("llama")
  writer.add_token_list(tokens)
  writer.add_token_scores([pieces.get_score(i) for i in ids])
  writer.add_token_types([4 if token in symbols else kind for token, kind in zip(tokens, kinds, strict=True)])
  writer.add_bool("tokenizer.ggml.add_space_prefix", adds_space)
  writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
  writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    write()
  return folder / "model.gguf", model


@pytest.mark.parametrize("adds_space", [True, False])
def test_a_sentencepiece_model_in_a_gguf_file(tmp_path, adds_space):
  file, model = sentencepiece_gguf(tmp_path, adds_space)
  ours, reference = get_tokenizer(str(file)), get_tokenizer(str(model))
  assert (ours.bos, ours.eot, ours.vocab_size) == (1, 2, reference.vocab_size)
  for start in (True, False):
    assert ours.encode_batch(TEXTS, start) == reference.encode_batch(TEXTS, start)
  for text in TEXTS:
    assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text))
  (tmp_path / "saved").mkdir()
  save_tokenizer(tmp_path / "saved", str(file), None)
  saved = get_tokenizer(str(tmp_path / "saved"))
  assert saved.encode_batch(TEXTS) == ours.encode_batch(TEXTS)
  assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == "LlamaTokenizer"


def test_ids_that_are_not_in_merge_order(tmp_path):
  from tokenizers import Tokenizer

  folder = byte_level(tmp_path, added=["<think>"])
  description = json.loads((folder / "tokenizer.json").read_text())
  vocabulary, merges = description["model"]["vocab"], description["model"]["merges"]
  first, last = "".join(merges[0]), "".join(merges[-1])
  vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
  (folder / "tokenizer.json").write_text(json.dumps(description))
  ours = get_tokenizer(str(gguf_file(folder, "gpt-2")))
  reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
  reference.encode_special_tokens = True
  for text in (*TEXTS, "a <think> b"):
    assert ours.encode(text) == reference.encode(text).ids
    assert ours.decode(ours.encode(text)) == text
  (tmp_path / "saved").mkdir()
  save_tokenizer(tmp_path / "saved", str(folder / "model.gguf"), None)
  saved = get_tokenizer(str(tmp_path / "saved"))
  assert [saved.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_a_tokenizer_of_bytes_has_no_merges(tmp_path):
  import gguf
  from tokenizers import pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  for name, tokens in (("bytes", alphabet), ("words", [*alphabet, "ab"])):
    writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, "<end>", "[PAD]"])
    writer.add_token_types([*[1] * len(tokens), 3, 5])
    writer.add_uint32("tokenizer.ggml.eos_token_id", len(tokens))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file,
                  writer.close):  # fmt: skip
      write()
  ours = get_tokenizer(str(tmp_path / "bytes.gguf"))
  assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS
  assert (len(ours.encode("[PAD]")), ours.eot, ours.vocab_size) == (5, 256, 258)
  with pytest.raises(InputError, match="tokenizer.ggml.merges is missing"):
    get_tokenizer(str(tmp_path / "words.gguf"))
