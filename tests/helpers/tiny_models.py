"""Settings of one tiny model per module, which use all options of the module."""

from typing import Any

GEMMA: dict[str, Any] = {
  "kv_heads": 1, "head_dim": 10, "norm_offset": True, "post_norms": True, "qk_norm": True, "activation": "gelu_tanh",
  "embed_scale": True, "query_scale": 5.0, "window": 4, "full_layers": [1], "rope_local_theta": 100.0,
  "logit_softcap": 9.0,
}  # fmt: skip
OLMO2: dict[str, Any] = {
  "kv_heads": 2, "head_dim": 6, "pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_per_head": False,
  "tied": False,
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
  "kv_heads": 2, "head_dim": 6, "tied": False,
  "options": {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True},
}  # fmt: skip
LONGROPE: dict[str, Any] = {
  "rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.5, 9.0],
  "original_max_position_embeddings": 64.0, "attention_factor": 1.2,
}  # fmt: skip
PHI3: dict[str, Any] = {
  "kv_heads": 2, "head_dim": 6, "partial_rotary_factor": 0.7, "rope_scaling": LONGROPE, "window": 5, "tied": False,
}  # fmt: skip
