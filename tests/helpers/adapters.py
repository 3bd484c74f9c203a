"""Adapters of every method with random leaves, and the arguments to save them."""

from dataclasses import replace
from typing import Any

import numpy as np

from lora_exp import lora
from lora_exp.lora import methods
from lora_exp.lora.target_table import scale_of

LLAMA = lora.Naming("model.", tied=lora.TiedHead("embed_tokens", "lm_head"), model_type="llama")
GPT2 = lora.Naming("transformer.", conv1d=True, tied=lora.TiedHead("wte", "lm_head"), model_type="gpt2")
SHAPES = {
  "embed_tokens": (31, 14), "layers.1.self_attn.q_proj": (14, 22), "layers.1.mlp.down_proj": (26, 14),
  "layers.11.self_attn.q_proj": (14, 22), "layers.11.mlp.down_proj": (26, 14),
}  # fmt: skip
FULL = {f"{path}.kernel": shape for path, shape in SHAPES.items() if path != "embed_tokens"} | {
  "embed_tokens.embedding": (31, 14), "norm.scale": (14,), "layers.1.input_layernorm.scale": (14,),
  "layers.1.self_attn.q_proj.bias": (22,), "layers.11.self_attn.q_proj.bias": (22,),
}  # fmt: skip
Q, DOWN, FAR = "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.11.self_attn.q_proj"


def adapter(method: str, ranks: dict[str, int], *, start=False, full=(), scaling="standard", dtype=np.float32, seed=0):
  """An adapter of `method` with random leaves for the modules in `ranks`, {path: rank}."""
  rng = np.random.default_rng(seed)
  kind = methods.get("pissa" if start else method)
  shared = {"vera_a": rng.normal(size=(40, 9)).astype(dtype), "vera_b": rng.normal(size=(9, 40)).astype(dtype)}
  rows, leaves = [], {}
  for i, (path, rank) in enumerate(ranks.items()):
    fan_in, fan_out = SHAPES[path]
    sizes = {"I": fan_in, "O": fan_out, "R": rank}
    own = {name: rng.normal(size=[sizes[x] for x in leaf.axes]).astype(dtype) for name, leaf in kind.leaves.items()}
    if method == "vera":
      own |= {"vera_a": shared["vera_a"][:fan_in, :rank], "vera_b": shared["vera_b"][:rank, :fan_out]}
    if method == "adalora":
      own["lora_e"][i % rank] = 0
    alpha = float(rank) if method == "vera" else 5.0 + i / 3
    scale = 1.0 if method == "vera" else scale_of(alpha, rank, scaling)
    row = lora.AdaptedModule(path, fan_in, fan_out, rank, alpha, scale)
    rows.append(replace(row, parameters=kind.trained_size(tuple(kind.leaves), row)))
    leaves[path] = own
  whole = {path: rng.normal(size=FULL[path]).astype(dtype) for path in full}
  return lora.Adapter(kind.name, tuple(rows), leaves, whole)


MIXED = {Q: 3, DOWN: 4, FAR: 3}
KINDS: dict[str, tuple[lora.Adapter, lora.Naming | None, dict[str, Any]]] = {
  "lora": (adapter("lora", MIXED), LLAMA, {}),
  "rslora": (adapter("lora", MIXED, scaling="rslora"), LLAMA, {"scaling": "rslora"}),
  "dora": (adapter("dora", {Q: 2, DOWN: 3}), LLAMA, {}),
  "pissa": (adapter("lora", {Q: 2, DOWN: 3}, start=True), LLAMA, {}),
  "olora, rslora": (adapter("lora", {Q: 2, DOWN: 3}, start=True, scaling="rslora"), LLAMA, {"scaling": "rslora"}),
  "vera": (adapter("vera", {Q: 9, DOWN: 9}), LLAMA, {}),
  "tied table": (adapter("lora", {"embed_tokens": 2, Q: 3}), LLAMA, {}),
  "biases and modules": (adapter("lora", {Q: 3}, full=["norm.scale", f"{DOWN}.kernel", f"{Q}.bias"]), LLAMA, {}),
  "all biases": (adapter("lora", {Q: 3}, full=[f"{Q}.bias", f"{FAR}.bias"]), LLAMA, {}),
  "whole table": (adapter("dora", {Q: 3}, full=["embed_tokens.embedding"]), LLAMA, {}),
  "float64": (adapter("lora", MIXED, dtype=np.float64), LLAMA, {}),
  "our own names": (adapter("lora", MIXED, full=["norm.scale", f"{Q}.bias", f"{FAR}.bias"]), None, {}),
  "our own vera of a table": (adapter("vera", {"embed_tokens": 4, Q: 9}), LLAMA, {}),
}
