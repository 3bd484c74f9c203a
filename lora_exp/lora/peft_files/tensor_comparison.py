"""Compares the tensors of an adapter file with those that its config and the model require.

A problem that many tensors share is reported once.
"""

from collections.abc import Sequence

from lora_exp.config import did_you_mean
from lora_exp.lora.peft_files.config_fields import shortened
from lora_exp.lora.peft_files.validation import AdapterFileCheck, counted
from lora_exp.runtime.safetensors_reader import DTYPES

LONGEST_NAME = 1000  # characters of a name for which a similar one is looked up
MOST_GROUPS = 4  # problems with tensors that are listed
VISION = ("vision", "visual", "image", "audio", "multi_modal_projector")  # parts of the names of modules without text


def compare(check: AdapterFileCheck) -> None:
  """Adds a problem to `check` for tensors that are missing, are unknown, or have the wrong shape or dtype."""
  entries, shapes = check.file.entries, _expected_shapes(check)
  missing = [name for name in shapes if name not in entries]
  _add_grouped(check, [(name, "is missing") for name in missing])
  wrong = [name for name in shapes if name in entries and entries[name].shape != shapes[name]]
  _add_grouped(check, [(name, _shape_text(check, name, shapes[name])) for name in wrong])
  _add_unknown(check, [name for name in entries if name not in shapes], missing)
  unreadable = [name for name, entry in entries.items() if entry.dtype not in DTYPES]
  supported = ", ".join(DTYPES)
  texts = [f"has dtype {shortened(entries[name].dtype)}; supported are {supported}" for name in unreadable]
  _add_grouped(check, list(zip(unreadable, texts, strict=True)))
  for name, pattern in check.config.patterns:
    if pattern.too_slow:
      check.config_problem(f"{name}: matching {shortened(pattern.text)} takes too long")


def _expected_shapes(check: AdapterFileCheck) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor that the file must or may have, by PEFT's name."""
  shapes = {name: tensor.shape for name, tensor in {**check.file_tensors, **check.parameters}.items()}
  shapes |= {name: (len(table.ids), table.features) for name, table in check.token_tables.items()}
  return shapes | {name: (row.fan_out,) for name, row in check.output_biases.items()}


def _shape_text(check: AdapterFileCheck, name: str, shape: Sequence[int]) -> str:
  """The problem with the shape of a tensor, with the rank in the config if it is a leaf of the adapter."""
  tensor = check.file_tensors.get(name)
  hint = ""
  if tensor is not None and tensor.leaf and tensor.path:
    hint = f" (r is {check.config.rank_of(check.names_of(tensor.path))} in {check.config.where})"
  return f"is {check.file.entries[name].shape}, expected {tuple(shape)}{hint}"


def _add_unknown(check: AdapterFileCheck, names: Sequence[str], missing: Sequence[str]) -> None:
  """Adds a problem for tensors that belong to no module of this model, or are not part of the config's adapter."""
  used = check.experts.used if check.experts is not None else set()
  unknown = [name for name in check.file.names.unknown if name not in used]
  vision = [name for name in unknown if any(part in name for part in VISION)]
  rest = [name for name in unknown if name not in vision]
  kind = f"{check.naming.model_type} " if check.naming is not None and check.naming.model_type else ""
  if not check.file.entries and not unknown:
    check.file_problem("contains no tensors")
  if vision:
    check.file_problem(f"{counted(vision, 'tensor')} adapt the part of the model that reads images or sound, such as "
                       f"{shortened(vision[0], 150)}; only text models are supported")
  if rest:
    near = did_you_mean(rest[0], missing or check.file_tensors) if len(rest[0]) < LONGEST_NAME else ""
    other = "; is the adapter of another model?" if not check.rows and not check.expert_rows else ""
    belong = "belongs" if len(rest) == 1 else "belong"
    check.file_problem(f"{counted(rest, 'tensor')} {belong} to no module of this {kind}model, such as "
                       f"{shortened(rest[0], 200)}{near}{other}")
  raw = [check.file.names.tensors[name].name for name in names]
  _add_grouped(check, [(name, f"is not part of the adapter that {check.config.where} describes") for name in raw])


def _add_grouped(check: AdapterFileCheck, problems: Sequence[tuple[str, str]]) -> None:
  """Adds (tensor, text) as problems. Tensors that differ only in the layer become one problem.

  With more than MOST_GROUPS such problems, only the first is named.
  """
  groups: dict[tuple[str, str], list[str]] = {}
  for name, text in problems:
    layerless = ".".join(segment for segment in name.split(".") if not segment.isdigit())
    groups.setdefault((layerless, text), []).append(name)
  if len(groups) > MOST_GROUPS:
    first, text = problems[0]
    check.file_problem(f"{len(problems)} tensors do not fit the model, such as {shortened(first, 200)}, which {text}")
    return
  for (_, text), names in groups.items():
    more = f" (and so in {counted(names[1:], 'other layer')})" if len(names) > 1 else ""
    check.file_problem(f"{shortened(names[0], 200)} {text}{more}")
