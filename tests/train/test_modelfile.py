"""The Modelfile of Ollama asks a model as this program does."""

import pytest
from corpora import BYTES

from lora_exp.data.chats.plain_turns import turns_prompt
from lora_exp.train.sampling.prompt_encoding import PromptFormat
from lora_exp.train.serving.modelfile import modelfile


def template(format: PromptFormat) -> str:
  return modelfile(BYTES, "./model.gguf", None, format).split('TEMPLATE """')[1].split('"""')[0]


@pytest.mark.parametrize("separator", ["", "\n"])
def test_a_plain_prompt_is_followed_by_its_separator(separator):
  assert template(PromptFormat(separator=separator)) == "{{ .Prompt }}" + separator


def test_turns_are_lines_for_a_run_on_lines():
  messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"},
              {"role": "user", "content": "Why?"}]
  parts = template(PromptFormat(lines=True)).split("{{ end }}")
  assert parts[0] == "{{ if .System }}System: {{ .System }}\n"
  user = parts[1].split('{{ if eq .Role "user" }}')[1].split("{{ else")[0]
  answer = parts[1].split('"assistant" }}')[1]
  asked = [(answer if message["role"] == "assistant" else user).replace("{{ .Content }}", message["content"])
           for message in messages]
  assert "".join(asked) + parts[-1] == turns_prompt(BYTES, messages)[0].rstrip(" ")
