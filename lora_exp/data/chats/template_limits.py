"""Limits on what an untrusted template may compute: time, text, and the sizes of values.

Jinja's sandbox prevents a template from calling other code, but not from running for days or filling the memory. Here
loops, macros and outputs are counted, and operators, filters and methods that enlarge a value are checked.
"""

import functools
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0  # of one rendering, on the processor; a long conversation takes milliseconds
MOST_TEXT = 10**7  # characters of a value, and of all that is written
MOST_ITEMS = 10**4  # of a list that a template makes, and of a range
MOST_BITS = 10**4  # of an integer
LONGEST_SOURCE = 10**6  # characters; published templates have up to 30,000
CHECK_EVERY = 64  # ticks between two checks of the time
# Formats with a large width or precision, or with one that is an argument.
PERCENT = re.compile(r"%(\([^)]*\))?[-+ #0]*(\d*\.)?(\d{5,}|\*)")
BRACES = re.compile(r"\{[^{}]*:[^{}]*(\d{5,}|\{)")
ENLARGING = ("center", "format", "indent", "join", "replace", "sum", "tojson", "wordwrap", "batch", "slice", "truncate")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
  """A sandbox with the limits above. `limited_nodes` prepares a template for it, and `rendering` begins to count."""

  intercepted_binops = frozenset(["+", "*", "**", "%"])

  def __init__(self, **settings: Any):
    super().__init__(**settings)
    self.used = threading.local()
    self.globals["range"] = _limited_range
    self.globals.pop("lipsum", None)
    self.rendering()

  def limit_filters(self) -> None:
    """Checks the arguments of the filters that may return more than they are given."""
    for name in ENLARGING:
      self.filters[name] = _limited(self.filters[name], name)

  def rendering(self) -> None:
    """Starts the count of one rendering in this thread."""
    self.used.ticks, self.used.letters, self.used.until = 0, 0, time.thread_time() + SECONDS

  def limited_nodes(self, source: str) -> nodes.Template:
    """The parsed template, which counts every loop, macro and output. Raises SecurityError for a very long one."""
    if len(source) > LONGEST_SOURCE:
      raise SecurityError(f"it has more than {LONGEST_SOURCE:,} characters")
    tree = self.parse(source)
    loops: list[nodes.For | nodes.Macro | nodes.CallBlock]
    loops = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]
    for loop in loops:
      letters = sum(len(text.data) for text in loop.find_all(nodes.TemplateData))
      tick = self._call("tick", [nodes.Const(letters)])
      loop.body.insert(0, nodes.ExprStmt(tick))
      if isinstance(loop, nodes.For) and loop.test is not None:
        loop.test = nodes.And(self._call("tick", [nodes.Const(0)]), loop.test)
    for output in list(tree.find_all(nodes.Output)):
      output.nodes = [node if isinstance(node, nodes.TemplateData) else self._call("written", [node])
                      for node in output.nodes]  # fmt: skip
    _replace_joined(tree, self._call)
    tree.set_environment(self)
    return tree

  def _call(self, method: str, values: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), values, [], None, None)

  # ---- called by templates

  def tick(self, letters: int) -> bool:
    """Counts a loop iteration that writes `letters` characters besides values. Raises SecurityError at the limit."""
    used = self.used
    used.ticks += 1
    used.letters += letters
    if used.letters > MOST_TEXT:
      raise SecurityError(f"it writes more than {MOST_TEXT:,} characters")
    if used.ticks % CHECK_EVERY == 0 and time.thread_time() > used.until:
      raise SecurityError(f"it takes more than {SECONDS:g} s")
    return True

  def written(self, value: Any) -> Any:
    """Counts the characters of `value` and returns it."""
    self.used.letters += len(value) if isinstance(value, str) else 1
    self.tick(0)
    return value

  def joined(self, *values: Any) -> str:
    """Joins the texts of `values`, like the operator `~`."""
    texts = [str(value) for value in values]
    _require_text(sum(map(len, texts)))
    return "".join(texts)

  def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
    """Computes `left` `operator` `right`. Raises SecurityError if the result is too large."""
    if operator == "%" and isinstance(left, str):
      _require_plain_format(left)
    elif operator == "**":
      if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MOST_BITS:
        raise SecurityError("it computes too large a power")
    elif operator == "*":
      _check_product(left, right)
    elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
      _require_size(left, len(left) + len(right))
    return super().call_binop(context, operator, left, right)

  def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
    """The method `format` of a text, with checks; None for other values."""
    wrapped = super().wrap_str_format(value)
    if wrapped is not None:
      _require_plain_format(value.__self__)
    return wrapped

  def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a function or method. Raises SecurityError if its result might be too large."""
    owner = getattr(__obj, "__self__", None)
    if isinstance(owner, str | bytes):
      _check_arguments(__obj.__name__, (owner, *args), kwargs)
    return super().call(__context, __obj, *args, **kwargs)


def _replace_joined(node: nodes.Node, call: Callable[[str, list[nodes.Expr]], nodes.Call]) -> None:
  """Replaces each `a ~ b` below `node` by a call that checks the length."""
  for name, value in node.iter_fields():
    if isinstance(value, nodes.Node):
      _replace_joined(value, call)
      if isinstance(value, nodes.Concat):
        setattr(node, name, call("joined", value.nodes))
    elif isinstance(value, list):
      for n, item in enumerate(value):
        if isinstance(item, nodes.Node):
          _replace_joined(item, call)
          if isinstance(item, nodes.Concat):
            value[n] = call("joined", item.nodes)


def _limited(filter: Callable[..., Any], name: str) -> Callable[..., Any]:
  """`filter` with a check of its arguments; it keeps the marks by which Jinja passes the environment."""
  passes_context = hasattr(filter, "jinja_pass_arg")

  @functools.wraps(filter)
  def limited(*args: Any, **kwargs: Any) -> Any:
    given = list(args[1:] if passes_context else args)
    if name in ("join", "sum") and given and not isinstance(given[0], str | list | tuple):
      given[0] = list(given[0])
    _check_arguments(name, tuple(given), kwargs)
    return filter(*args[:1], *given, **kwargs) if passes_context else filter(*given, **kwargs)

  return limited


def _check_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
  """Raises SecurityError if the method or filter `name` of `args[0]` might return too much."""
  value, *others = (*args, *kwargs.values())
  size = len(value) if isinstance(value, str | bytes | list | tuple) else 1
  numbers = [abs(x) for x in others if isinstance(x, int)]
  if numbers:
    lines = value.count("\n") + 1 if isinstance(value, str) and name == "indent" else 1
    _require_text(max(numbers) * (max(1, size) if name in ("expandtabs", "tojson") else lines))
  if name == "format" and isinstance(value, str):
    _require_plain_format(value)
  texts = [x for x in others if isinstance(x, str)]
  if name == "replace" and isinstance(value, str) and len(texts) > 1:
    _require_text(size + (value.count(texts[0]) if texts[0] else size + 1) * len(texts[1]))
  if name == "join":
    items = value if isinstance(value, list | tuple) else next((x for x in others if isinstance(x, list | tuple)), [])
    separator = value if isinstance(value, str) else "".join(texts)
    _require_text(len(items) * len(separator) + sum(len(x) for x in items if isinstance(x, str)))
  if name == "sum" and isinstance(value, list | tuple):
    _require_text(sum(len(x) for x in value if isinstance(x, str | list | tuple)))


def _limited_range(*args: int) -> range:
  """`range` of at most MOST_ITEMS numbers."""
  numbers = range(*args)
  _require_size(numbers, len(numbers))
  return numbers


def _check_product(left: Any, right: Any) -> None:
  if isinstance(left, int) and isinstance(right, int):
    if left.bit_length() + right.bit_length() > MOST_BITS:
      raise SecurityError("it computes too large a number")
    return
  value, times = (right, left) if isinstance(left, int) else (left, right)
  if isinstance(value, str | list | tuple) and isinstance(times, int):
    _require_size(value, len(value) * max(0, times))


def _require_size(value: Sequence[Any], size: int) -> None:
  """Raises SecurityError if a text or list like `value` must not have `size` characters or items."""
  if isinstance(value, str):
    _require_text(size)
  elif size > MOST_ITEMS:
    raise SecurityError(f"it makes a list of more than {MOST_ITEMS:,} items")


def _require_text(size: int) -> None:
  if size > MOST_TEXT:
    raise SecurityError(f"it makes a text of more than {MOST_TEXT:,} characters")


def _require_plain_format(text: str) -> None:
  if PERCENT.search(text) or BRACES.search(text):
    raise SecurityError("it formats a value with too large a width")
