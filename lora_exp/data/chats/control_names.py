"""Control tokens that ordinary text spells out, such as `<|im_end|>` in a question."""

import re

from lora_exp.data.tokenization import Tokenizer


class ControlNames:
  """Finds control tokens that a text spells out. They are encoded as ordinary text."""

  def __init__(self, tokenizer: Tokenizer):
    names = [token for token in tokenizer.special_tokens if len(token) > 1]
    self.beginnings = {name[:2] for name in names}  # searched first, because that is fast
    self.pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")

  def first(self, *texts: str) -> str | None:
    """The first name in `texts`, or None."""
    for text in texts:
      if any(beginning in text for beginning in self.beginnings):
        match = self.pattern.search(text)
        if match is not None:
          return match[0]
    return None


def control_name_reason(name: str) -> str:
  """The reason in `not_learned` for a text that spells out the control token `name`."""
  return f"{name!r} in their text is encoded as ordinary text, not as the control token"
