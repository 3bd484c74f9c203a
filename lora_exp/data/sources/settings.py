"""A source's settings, taken from the config: those of `DataConfig` by name, all others from `data.options`."""

import dataclasses
from typing import Any, get_type_hints

from lora_exp.config.conversion import TypeConverter
from lora_exp.config.errors import did_you_mean
from lora_exp.config.schema import DataConfig
from lora_exp.data.sources.source import COMMON, Source


def make_source(cls: type[Source], cfg: DataConfig) -> tuple[Source, list[str]]:
  """Returns the source with the settings in `cfg`, and the problems of `cfg.options`, which name settings `data.NAME`.

  An option with a problem has its default value in the source.
  """
  own = {setting.name: setting for setting in dataclasses.fields(cls) if setting.name not in COMMON}
  hints = get_type_hints(cls)
  converter = TypeConverter()
  values: dict[str, Any] = {setting.name: getattr(cfg, setting.name) for setting in dataclasses.fields(cls)
                            if setting.name in COMMON}
  for name, value in cfg.options.items():
    if name in own:
      values[name] = converter.convert(hints[name], value, f"data.options.{name}")
    else:
      known = f"it has {', '.join(own)}" if own else "it has none"
      problem = f"data.options.{name}: no such option of the source {cls.name}; {known}{did_you_mean(name, own)}"
      converter.problems.append(problem)
  for name, setting in own.items():
    if name not in values and setting.default is dataclasses.MISSING and setting.default_factory is dataclasses.MISSING:
      converter.problems.append(f"data.options.{name}: the source {cls.name} needs it; add data.options.{name}=VALUE")
      values[name] = None
  return cls(**values), converter.problems
