"""Hugging Face's config.json as our settings: `from_hf` makes the fields of `ModelConfig` that the file decides.

Both layouts are read, that of transformers 4 (rope_theta, rope_scaling) and of 5 (rope_parameters). What the file omits
has the default of transformers' own class; what this program cannot compute is refused, every such field at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.schema import ArchConfig

ACTIVATIONS = {
  "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
  "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers
REQUIRED = object()
MOST = {"num_hidden_layers": 10_000, "n_layer": 10_000}
MOST_OF_ALL = 10**9  # of any other size
SIZES = {  # our field: theirs
  "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
  "ff": "intermediate_size", "max_len": "max_position_embeddings", "vocab_size": "vocab_size",
}
SCALING = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                            "original_max_position_embeddings")}


@dataclass
class File:
  """A config.json while it is read: typed look-ups with defaults; what does not fit goes into `problems`."""

  values: Mapping[str, Any]
  defaults: Mapping[str, Any] = field(default_factory=dict)
  problems: list[str] = field(default_factory=list)

  def get(self, name: str) -> Any:
    """The field, or its default where it is absent (null is a value)."""
    found = self.values.get(name, self.defaults.get(name))
    if found is REQUIRED:
      self.problems.append(f"{name} is missing")
      return None
    return found

  def count(self, name: str, absent: int | None = None) -> int:
    """A whole number from 1 to MOST; `absent` for null, where there is one."""
    found = self.get(name)
    if found is None and absent is not None:
      return absent
    if isinstance(found, int) and not isinstance(found, bool) and 1 <= found <= MOST.get(name, MOST_OF_ALL):
      return found
    if name in self.values:
      most = MOST.get(name, MOST_OF_ALL)
      self.problems.append(f"{name}={shortened(found)}: must be a whole number from 1 to {most:,}")
    return 1

  def number(self, name: str) -> float | None:
    """A positive number, or None for null."""
    found = self.get(name)
    if found is None:
      return None
    if isinstance(found, int | float) and not isinstance(found, bool) and 0 < found <= 1e300:
      return float(found)
    self.problems.append(f"{name}={shortened(found)}: must be a number above 0")
    return None

  def flag(self, name: str) -> bool:
    """True or false; null is false."""
    found = self.get(name)
    if found not in (None, True, False):
      self.problems.append(f"{name}={shortened(found)}: must be true or false")
    return found is True

  def table(self, name: str) -> dict[str, Any]:
    """A mapping; null is an empty one."""
    found = self.get(name)
    if found is None or isinstance(found, dict):
      return found or {}
    self.problems.append(f"{name}={shortened(found)}: must be a mapping")
    return {}

  def refuse(self, name: str, supported: str) -> None:
    """Notes that the value of `name` is not supported."""
    self.problems.append(f"{name}={shortened(self.values.get(name))}: not supported; {supported}")


def shortened(value: Any) -> str:
  """`value` in at most 60 characters."""
  text = str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
  """The fields of `ModelConfig` that config.json decides: family, sizes and `arch`, as plain values.

  Raises InputError, each problem after the file's name `where`, for an architecture, field or value that is not
  supported, and for a missing size.
  """
  try:
    return _from_hf(config)
  except InputError as error:
    raise InputError([f"{where}: {problem}" for problem in error.problems]) from None


def _from_hf(config: Mapping[str, Any]) -> dict[str, Any]:
  name = _architecture(config)
  text = config
  if name == "Gemma3ForConditionalGeneration":
    text = File(config).table("text_config")
    text = {"tie_word_embeddings": config.get("tie_word_embeddings", True), **text}
  defaults, read = ARCHITECTURES[name]
  file = File(text, defaults)
  if config.get("quantization_config") is not None:
    file.problems.append("quantization_config: quantised checkpoints are not supported; use the model in bfloat16, "
                         "float16 or float32")
  for key in ("use_bidirectional_attention", "add_cross_attention", "scale_attn_by_inverse_layer_idx"):
    if text.get(key):
      file.refuse(key, "supported: false")
  fields = read(file)
  if file.problems:
    raise InputError(list(dict.fromkeys(file.problems)))
  return fields


def _architecture(config: Mapping[str, Any]) -> str:
  named = config.get("architectures")
  if named:
    name = str(named[0] if isinstance(named, list) else named)
  else:
    name = MODEL_TYPES.get(str(config.get("model_type")), str(config.get("model_type")))
  if name not in ARCHITECTURES:
    supported = ", ".join(ARCHITECTURES) + did_you_mean(name, ARCHITECTURES)
    raise InputError(f"architectures={shortened(name)}: not supported; choose {supported}")
  return name


def _fields(family: str, file: File, arch: ArchConfig, names: Mapping[str, str] = SIZES) -> dict[str, Any]:
  sizes = {ours: file.count(theirs) for ours, theirs in names.items()}
  return {"family": family, **sizes, "arch": asdict(arch)}


def _activation(file: File, name: str, value: Any) -> str:
  if not isinstance(value, str) or value not in ACTIVATIONS:
    file.refuse(name, f"choose {', '.join(sorted(ACTIVATIONS))}")
    return "silu"
  return ACTIVATIONS[value]


def _gpt2(file: File) -> dict[str, Any]:
  if not file.flag("scale_attn_weights"):
    file.refuse("scale_attn_weights", "supported: true")
  heads, width = file.count("n_head"), file.count("n_embd")
  arch = ArchConfig(
    kv_heads=heads, head_dim=max(1, width // heads), norm_eps=file.number("layer_norm_epsilon") or 1e-5,
    activation=_activation(file, "activation_function", file.get("activation_function")),
    qkv_bias=True, out_bias=True, mlp_bias=True, tied=file.flag("tie_word_embeddings"),
  )
  names = {"layers": "n_layer", "width": "n_embd", "heads": "n_head", "max_len": "n_positions",
           "vocab_size": "vocab_size"}
  return {**_fields("gpt2", file, arch, names), "ff": file.count("n_inner", absent=4 * width)}


def _llama(file: File) -> dict[str, Any]:
  """Everything that Llama, Mistral, Qwen and Gemma have in common."""
  heads, width = file.count("num_attention_heads"), file.count("hidden_size")
  theta, scaling = _rope(file, _rope_parameters(file))
  arch = ArchConfig(
    kv_heads=file.count("num_key_value_heads", absent=heads),
    head_dim=file.count("head_dim", absent=max(1, width // heads)),
    rope_theta=theta, rope_scaling=scaling, norm_eps=file.number("rms_norm_eps") or 1e-6,
    activation=_activation(file, "hidden_act", file.get("hidden_act")),
    qkv_bias=file.flag("attention_bias"), out_bias=file.flag("attention_bias"), mlp_bias=file.flag("mlp_bias"),
    tied=file.flag("tie_word_embeddings"),
  )
  if heads % arch.kv_heads:
    file.problems.append(f"num_key_value_heads={arch.kv_heads}: must divide num_attention_heads={heads}")
  return _fields("llama", file, arch)


def _mistral(file: File) -> dict[str, Any]:
  fields = _llama(file)
  window = file.count("sliding_window", absent=0)
  if window and any(kind != SLIDING for kind in _kinds(file, fields["layers"]) or ()):
    file.refuse("layer_types", "Mistral's layers all have the window")
  fields["arch"]["window"] = window or None
  return fields


def _qwen(file: File) -> dict[str, Any]:
  fields = _llama(file)
  fields["arch"]["qk_norm"] = "head_dim" in file.defaults  # Qwen3; Qwen2 has no such setting
  if "head_dim" not in file.defaults:
    fields["arch"].update(qkv_bias=True, out_bias=False)
  if file.flag("use_sliding_window"):
    first = file.get("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int):
      file.refuse("max_window_layers", "must be a number of layers")
      first = 0
    usual = [SLIDING if i >= first else FULL for i in range(fields["layers"])]
    _windows(file, fields, _kinds(file, fields["layers"]) or usual)
  return fields


def _gemma(file: File) -> dict[str, Any]:
  name = "hidden_activation" if file.values.get("hidden_activation") else "hidden_act"
  value = file.get(name)
  value = "gelu_tanh" if value == "gelu" else value  # the releases' word for the tanh approximation
  fields = _llama(File({**file.values, "hidden_act": value}, file.defaults, file.problems))
  fields["arch"].update(norm_offset=True, embed_scale=True)
  return fields


def _gemma3(file: File) -> dict[str, Any]:
  layers, pattern = file.count("num_hidden_layers"), file.count("sliding_window_pattern")
  kinds = _kinds(file, layers) or [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
  wide, near = _gemma3_rope(file)
  fields = _llama(File({**file.values, "hidden_act": file.get("hidden_activation"), "rope_parameters": wide,
                        "rope_scaling": None}, file.defaults, file.problems))
  local, scaled = _rope(file, near)
  if scaled:
    file.problems.append("rope_parameters.sliding_attention: layers with a window cannot have a scaled rotation")
  scale = file.number("query_pre_attn_scalar")
  fields["arch"].update(
    norm_offset=True, embed_scale=True, post_norms=True, qk_norm=True, rope_local_theta=local, query_scale=scale,
    logit_softcap=file.number("final_logit_softcapping"),  # attn_logit_softcapping is Gemma 2's: no code applies it
  )
  _windows(file, fields, kinds)
  return fields


def _gemma3_rope(file: File) -> tuple[dict[str, Any], dict[str, Any]]:
  """The rotations of the layers that see everything and of those with a window."""
  given = File(file.table("rope_parameters"), problems=file.problems)
  if given.values and FULL not in given.values and SLIDING not in given.values:
    file.problems.append("rope_parameters: must hold full_attention and sliding_attention")
  wide = {"rope_theta": file.values.get("rope_theta", 1e6), **given.table(FULL), **file.table("rope_scaling")}
  return wide, {"rope_theta": file.values.get("rope_local_base_freq", 1e4), **given.table(SLIDING)}


def _kinds(file: File, layers: int) -> list[str]:
  """What each layer sees by `layer_types`, or [] where the file does not say."""
  kinds = file.get("layer_types")
  if kinds is None or (isinstance(kinds, list) and len(kinds) == layers and all(k in (FULL, SLIDING) for k in kinds)):
    return kinds or []
  file.refuse("layer_types", f"must be {FULL} or {SLIDING} for each of num_hidden_layers={layers}")
  return []


def _windows(file: File, fields: dict[str, Any], kinds: list[str]) -> None:
  """Sets `window` and `full_layers` from the kind of each layer."""
  window = file.count("sliding_window", absent=0)
  if window and SLIDING in kinds:
    full = [i for i, kind in enumerate(kinds) if kind == FULL]
    fields["arch"].update(window=window, full_layers=full or None)


def _rope_parameters(file: File) -> dict[str, Any]:
  given = file.table("rope_scaling") or file.table("rope_parameters")
  if FULL in given or SLIDING in given:
    file.refuse("rope_parameters", "supported: one rotation for all layers, {rope_type, rope_theta, ...}")
    given = {}
  given = {"rope_theta": file.values.get("rope_theta", 1e4), **given}
  if "partial_rotary_factor" in file.values:
    given.setdefault("partial_rotary_factor", file.values["partial_rotary_factor"])
  return given


def _rope(file: File, given: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
  """(theta, the scaling or None) of one rotation; its defaults come from the file."""
  kind = str(given.get("rope_type", given.get("type", "default")))
  if (part := given.get("partial_rotary_factor")) not in (None, 1):
    file.problems.append(f"partial_rotary_factor={shortened(part)}: not supported; supported: 1")
  inner = File(given, {"rope_theta": 1e4, **dict.fromkeys(SCALING.get(kind, ()), REQUIRED)})
  if kind == "llama3":
    inner.defaults = {**inner.defaults, "original_max_position_embeddings": file.get("max_position_embeddings")}
  theta = inner.number("rope_theta") or 1e4
  scaling = None
  if kind in SCALING:
    values = {name: inner.number(name) for name in SCALING[kind]}
    scaling = {"rope_type": kind, **values}
  elif kind != "default":
    inner.problems.append(f"rope_type={shortened(kind)}: not supported; choose default, {', '.join(SCALING)}")
  file.problems += [f"rope_scaling.{problem}" if kind != "default" else problem for problem in inner.problems]
  return theta, scaling


Reader = Callable[[File], dict[str, Any]]
_NEEDED = dict.fromkeys(("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"),
                        REQUIRED)
_QWEN = {**_NEEDED, "num_key_value_heads": 32, "hidden_act": "silu", "max_position_embeddings": 32768,
         "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {**_NEEDED, "hidden_act": "gelu_pytorch_tanh", "head_dim": 256, "tie_word_embeddings": True}
_GEMMA3 = {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208, "sliding_window": 4096,
           "max_position_embeddings": 131072, "hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6,
           "query_pre_attn_scalar": 256}
ARCHITECTURES: dict[str, tuple[Mapping[str, Any], Reader]] = {  # transformers' defaults, and how the rest is read
  "GPT2LMHeadModel": ({
    **dict.fromkeys(("n_layer", "n_embd", "n_head", "vocab_size"), REQUIRED), "n_positions": 1024,
    "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "scale_attn_weights": True,
    "tie_word_embeddings": True,
  }, _gpt2),
  "LlamaForCausalLM": ({**_NEEDED, "hidden_act": "silu", "max_position_embeddings": 2048}, _llama),
  "MistralForCausalLM": ({**_NEEDED, "hidden_act": "silu", "num_key_value_heads": 8, "sliding_window": 4096,
                          "max_position_embeddings": 131072}, _mistral),
  "Qwen2ForCausalLM": (_QWEN, _qwen),
  "Qwen3ForCausalLM": ({**_QWEN, "head_dim": 128}, _qwen),
  "GemmaForCausalLM": ({**_GEMMA, "num_key_value_heads": 16, "max_position_embeddings": 8192}, _gemma),
  "Gemma3ForCausalLM": (_GEMMA3, _gemma3),
  "Gemma3ForConditionalGeneration": (_GEMMA3, _gemma3),
}
MODEL_TYPES = {
  "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
  "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma": "GemmaForCausalLM",
  "gemma3_text": "Gemma3ForCausalLM", "gemma3": "Gemma3ForConditionalGeneration",
}
