'''Data sources, one file each. The registry imports every file in this folder.

A file has everything specific to its source: settings, their checks, documents, the identity for the cache, and error
messages. `data.source_writer` packs documents into rows, and `data.source_checks` has the checks common to all sources.

Add a source
------------

A source is one file in this folder and one in `conf/data/`; nothing else is edited. The example below reads poems that
are separated by blank lines. `data/sources/poems.py`:

    """Poems of a text file."""

    from collections.abc import Iterator
    from dataclasses import dataclass

    from lora_exp.data.sources.file_source import FileSource
    from lora_exp.data.documents import Document


    @dataclass(frozen=True)
    class Poems(FileSource):
      """Poems of a UTF-8 file, separated by blank lines; the title may be read as a prompt."""

      name = "poems"
      unit = "poems"
      content = "a text file of poems, separated by blank lines"
      suffixes = (".txt",)
      prompt_separator = "\\n"

      min_lines: int = 2
      title_as_prompt: bool = False

      def check(self) -> Iterator[str]:
        if self.min_lines < 2:
          yield self.problem("min_lines", "must be at least 2, a title and a line")

      def documents(self) -> Iterator[Document]:
        key = 0
        for poem in "\\n\\n".join(self.texts()).split("\\n\\n"):
          lines = poem.strip().splitlines()
          if len(lines) < self.min_lines:
            continue
          title, text = (lines[0], lines[1:]) if self.title_as_prompt else ("", lines)
          yield Document(key, "\\n".join(text), prompt=title)
          key += 1

`conf/data/poems.yaml` lists the source's own settings under `options`, with their defaults:

    # Poems of a text file: data.path=FILE, separated by blank lines.
    defaults: [_base, _self_]

    source: poems
    options:
      min_lines: 2
      title_as_prompt: false

Now `data=poems data.path=FILE data.options.min_lines=4` trains. `data@retain=poems retain.path=FILE` works too.

- **The base class** is `TextSource`, `FileSource` for sources that read the files of `data.path`, or `NumericSource`
  for models without tokens. See `data/sources/source.py`.
- **Settings** are the fields of the dataclass. A field with the name of a setting of `data` (`view`, `seed`, `limit`,
  ...) has the value of that setting. Any other field is `data.options.NAME`, converted to the type of the field. An
  option without a field is an error that suggests the nearest spelling.
- **Checks**: `check` yields the problems of the settings, `check_inputs` those of files and packages. They run
  before anything is created, and are shown together with all other problems of the command line.
- **Documents** have a `key`. Of every ten keys one is held out (`data.eval_fraction`), so documents that belong
  together share one. Yield `Skipped` for a row that cannot be used: it is counted, and shown before training. If the
  whole file cannot be read, raise `InputError` with the line and what to do.
- **Identity**: rows are cached under the hash of `name`, `version`, every setting, and `digest()`. `FileSource` hashes
  its files, `TextSource` all documents. A setting that affects the data only through the digest, such as a path, may be
  declared `covered_by_digest`. Raise `version` when the code yields other documents for the same files and settings.
'''

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.schema import DataConfig
from lora_exp.data.sources.settings import make_source
from lora_exp.data.sources.source import NumericSource, Source, TextSource

__all__ = [
  "NumericSource", "Source", "TextSource", "data_facts", "has_conversations", "is_numeric", "open_source",
  "prompt_separator", "registry", "source_class",
]


@cache
def registry() -> Mapping[str, type[Source]]:
  """All sources by name: the classes with a `name` in the files of this folder."""
  found: dict[str, type[Source]] = {}
  for module in pkgutil.iter_modules(__path__):
    loaded = importlib.import_module(f"{__name__}.{module.name}")
    for cls in vars(loaded).values():
      if inspect.isclass(cls) and issubclass(cls, Source) and cls.__module__ == loaded.__name__ and "name" in vars(cls):
        if found.get(cls.name, cls) is not cls:
          raise ValueError(f"{cls} and {found[cls.name]} are both called {cls.name!r}")
        found[cls.name] = cls
  return MappingProxyType(found)


def source_class(name: str) -> type[Source]:
  """The source `name`. Raises InputError with the nearest spelling if there is none."""
  if name not in registry():
    raise InputError(f"data.source={name}: choose {', '.join(registry())}{did_you_mean(name, registry())}")
  return registry()[name]


def is_numeric(cfg: DataConfig) -> bool:
  """Whether the rows of `cfg` are numeric examples, each of which counts as one token."""
  return source_class(cfg.source).numeric


def prompt_separator(cfg: DataConfig) -> str | None:
  """The text between a prompt and its answer in the documents of `cfg`; None if they have no answers."""
  source, _ = make_source(source_class(cfg.source), cfg)
  return source.separator() if isinstance(source, TextSource) else None


def has_conversations(cfg: DataConfig) -> bool:
  """Whether the documents of `cfg` are conversations."""
  source, _ = make_source(source_class(cfg.source), cfg)
  return isinstance(source, TextSource) and source.has_conversations()


def data_facts(cfg: DataConfig) -> dict[str, object]:
  """What the source of `cfg` reads, and its first example, for the table before training; {} if it reads no files.

  Raises InputError for bad files.
  """
  source, _ = make_source(source_class(cfg.source), cfg)
  return source.facts() if isinstance(source, TextSource) else {}


def open_source(cfg: DataConfig) -> Source:
  """Creates the source of `cfg`. Raises InputError with every problem of its settings and files.

  Messages name the settings `data.NAME`.
  """
  source, problems = make_source(source_class(cfg.source), cfg)
  problems += [*source.check(), *source.check_inputs()]
  if problems:
    raise InputError(problems)
  return source
