"""The columns of a row and what they mean, in conversations, prompts and responses, and texts."""

import json

import pytest

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.documents import Conversation, Document, Skipped
from lora_exp.data.formats.layouts import Layout
from lora_exp.data.formats.row import Row
from lora_exp.data.sources import open_source

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be short."}


def read(fields: dict, layout: Layout = Layout()) -> Document:
  document = layout.document(Row("x.jsonl, line 1", fields), 0)
  assert isinstance(document, Document), document
  return document


def turns(fields: dict, layout: Layout = Layout()) -> Conversation:
  document = read(fields, layout)
  assert document.conversation is not None and not document.text and not document.prompt
  return document.conversation


def skipped(fields: dict, layout: Layout = Layout()) -> str:
  result = layout.document(Row("x.jsonl, line 1", fields), 0)
  assert isinstance(result, Skipped) and result.where.startswith("x.jsonl, line 1")
  return result.reason


@pytest.mark.parametrize(("fields", "prompt", "text"), [
  ({"prompt": "a", "response": "b"}, "a", "b"), ({"prompt": "a", "completion": "b"}, "a", "b"),
  ({"instruction": "a", "input": "c", "output": "b"}, "a\nc", "b"),
  ({"instruction": "a", "input": "", "output": "b"}, "a", "b"),
  ({"instruction": "a", "context": "c", "response": "b"}, "a\nc", "b"), ({"question": "a", "answer": "b"}, "a", "b"),
  ({"Question": "a", "ANSWER ": "b"}, "a", "b"), ({"input": "a", "output": "b"}, "a", "b"),
  ({"query": "a", "response": "b"}, "a", "b"), ({"text": "b"}, "", "b"), ({"content": "b"}, "", "b"),
  ({"prompt": "", "response": "b"}, "", "b"), ({"prompt": None, "response": "b"}, "", "b"),
  ({"prompt": "[1, 2] is a list", "response": "[{'a': 1}]"}, "[1, 2] is a list", "[{'a': 1}]"),
  ({"prompt": [{"type": "text", "text": "a"}], "response": "b"}, "a", "b"),
  *(({"prompt": "List them", "response": text}, "List them", text) for text in (
    '[{"name": "Ann", "role": "engineer"}]', '[{"from": "ann@x.org", "text": "Hi"}]', '[{"role": "user", "id": 1}]',
    '[{"speaker": "user", "text": "Hi", "mood": "good"}]', '[{"role": "user"}]')),
  ({"instruction": "a", "output": "b", "text": "a b"}, "a", "b"),
])
def test_columns_are_found_by_name(fields, prompt, text):
  document = read(fields)
  assert (document.prompt, document.text, document.conversation) == (prompt, text, None)


@pytest.mark.parametrize(("fields", "messages"), [
  ({"messages": [SYSTEM, USER, ANSWER]}, (SYSTEM, USER, ANSWER)),
  ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, (USER, ANSWER)),
  ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be short."},
   (SYSTEM, USER, ANSWER)),
  ({"conversation": [USER, ANSWER]}, (USER, ANSWER)), ({"messages": json.dumps([USER, ANSWER])}, (USER, ANSWER)),
  ({"messages": str([USER, ANSWER])}, (USER, ANSWER)),  # as pandas writes it to CSV
  ({"system_prompt": "Be short.", "question": "Hi", "response": "Hello"}, (SYSTEM, USER, ANSWER)),
  ({"instruction": "Hi", "output": "Hello", "history": [["Hi", "Hello"]]}, (USER, ANSWER, USER, ANSWER)),
  ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, ANSWER]},
   (USER, ANSWER)),
  ({"conversation": [{"human": "Hi", "assistant": "Hello"}]}, (USER, ANSWER)),
  ({"prompt": [USER], "response": "Hello"}, (USER, ANSWER)), ({"prompt": "Hi", "completion": [ANSWER]}, (USER, ANSWER)),
  ({"prompt": "Hi", "completion": "Hello", "messages": [USER, ANSWER]}, (USER, ANSWER)),
])
def test_conversations_take_one_form(fields, messages):
  assert turns(fields).messages == messages


def test_a_prompt_of_messages_is_marked_as_such():
  conversation = turns({"prompt": [SYSTEM, USER], "completion": [ANSWER]})
  assert conversation == Conversation((SYSTEM, USER, ANSWER), prompt_messages=2)
  assert turns({"prompt": [USER], "completion": [ANSWER], "system": "Be short."}).prompt_messages == 2
  assert turns({"messages": [USER, ANSWER]}).prompt_messages == 0


def test_turns_of_weight_zero_are_not_learned():
  rows = [{**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}, USER, {**ANSWER, "train": False}]
  conversation = turns({"messages": [USER, *rows], "system": "Be short."})
  assert conversation.zero_weight == {2, 6} and conversation.messages[2] == ANSWER


def test_calls_of_functions_are_objects():
  arguments = {"city": "Paris"}
  call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
  openai = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(arguments)}}]}
  result = {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"}
  found = turns({"messages": [USER, openai, result, ANSWER], "tools": json.dumps([call["function"]])})
  assert found.messages[1] == {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **call}]}
  assert found.messages[2] == result and found.tools == ({"type": "function", "function": call["function"]},)
  sharegpt = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(call["function"])},
              {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "Hello"}]
  shared = turns({"conversations": sharegpt})
  assert shared.messages[1] == {"role": "assistant", "content": None, "tool_calls": [call]}
  assert shared.messages[2] == {"role": "tool", "content": "rain"}
  old = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Paris"}'}}
  assert turns({"messages": [USER, old]}).messages[1] == shared.messages[1]


@pytest.mark.parametrize(("fields", "reason"), [
  ({"messages": []}, "no assistant turn"), ({"messages": [USER]}, "no assistant turn"),
  ({"messages": [USER, {"role": "assistant"}]}, "a message with the role 'assistant' has no content"),
  ({"messages": [USER, "Hello"]}, "a message is not an object"),
  ({"messages": [{"content": "Hi"}]}, "a message has no role"),
  ({"messages": [USER, {"role": "narrator", "content": "x"}]}, "the role 'narrator' is unknown; known are system, "),
  ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "a part of type 'image_url'"),
  ({"messages": [{"role": "user", "content": [{"type": "text", "content": "x"}]}, ANSWER]}, "a part without a text"),
  ({"text": [USER, ANSWER]}, "the text has a part without a text"),
  ({"prompt": "a", "chosen": "b", "rejected": "c"}, "data.columns={prompt: prompt, response: chosen} learns the"),
  ({"chosen": "b", "rejected": "c"}, "data.columns={text: chosen} learns the chosen one"),
  ({"prompt": "a", "chosen": [USER], "rejected": [USER]}, "data.columns={messages: chosen} learns the chosen one"),
  ({"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "{prompt: prompt, response: chosen} learns the"),
  ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "data.columns={messages: chosen} learns the chosen one"),
  ({"prompt": "a"}, "there is no column 'response'; the columns are 'prompt'"),
  ({"q": "a", "a": "b"}, "data.columns={prompt: NAME, response: NAME} or"), ({}, "the columns are none"),
  ({"prompt": 3, "response": "b"}, "the prompt has type int"), ({"text": ""}, "the text is empty"),
  ({"prompt": "a", "completion": [USER]}, "no assistant turn"),
  ({"messages": [USER, ANSWER], "tools": 3}, "the tools are not a list of objects"),
  ({"instruction": "a", "output": "b", "history": ["x"]}, "the history is not a list of"),
])
def test_rows_that_cannot_be_used_have_a_reason(fields, reason):
  assert reason in skipped(fields)


def test_what_nobody_reads_is_named():
  pair = {"prompt": "a", "response": "b", "id": 1, "empty": "", "none": None}
  assert read(pair).unread == ("the column 'id' is not read",)
  rows = {"messages": [{**USER, "id": 3}, ANSWER], "prompt": "Hi", "source": "web"}
  unread = ("the column 'prompt'", "the column 'source'", "the key 'id' of messages")
  assert read(rows).unread == tuple(f"{name} is not read" for name in unread)
  assert read({"prompt": "a", "response": ""}).unread == ("the response is empty, and only its end is learned",)
  assert read({"messages": [USER, {**ANSWER, "weight": 0}]}).unread == ("some turns have weight 0",)


def test_what_is_empty_or_ignored_is_said():
  for empty in (None, ""):
    assert read({"prompt": empty, "response": "b"}).unread == ("the prompt is empty",)
  assert read({"response": "b"}, Layout({"response": "response"})).unread == ()
  assert read({"messages": [USER, {**ANSWER, "content": ""}]}).unread == (
    "an answer is empty, and only its end is learned",)
  for weight in (0.5, "0"):
    told = read({"messages": [USER, {**ANSWER, "weight": weight}]}).unread
    assert told == ("the key 'weight' of messages is not read",)
  both = {"system": "Be long.", "messages": [SYSTEM, USER, ANSWER]}
  assert read(both).unread == ("the column 'system' is not read, because the messages begin with a system turn",)
  assert read({**both, "system": SYSTEM["content"]}).unread == ()


def test_a_column_of_messages_may_be_null():
  pair = {"messages": None, "prompt": "a", "response": "b"}
  assert (read(pair).prompt, read(pair).text, read(pair).unread) == ("a", "b", ())
  assert read({"conversations": None, "text": "b"}).text == "b"
  assert skipped({"messages": None, "id": 3}) == "the messages are not a list"


def test_columns_may_be_named():
  chosen = Layout({"prompt": "q", "response": "a"})
  assert read({"q": "x", "a": "y", "input": "z"}, chosen).unread == ("the column 'input' is not read",)
  assert skipped({"prompt": "x", "a": "y"}, chosen) == "there is no column 'q'; the columns are 'prompt', 'a'"
  assert skipped({"Q": "x", "a": "y"}, chosen).endswith("'Q', 'a'; did you mean Q?")
  assert read({"story": "y"}, Layout({"text": "story"})).text == "y"
  assert read({"q": "x", "a": "y"}, Layout({"response": "a"})).prompt == ""
  assert turns({"log": [USER, ANSWER]}, Layout({"messages": "log"})).messages == (USER, ANSWER)


def test_the_former_settings_name_columns():
  alpaca = Layout(prompt_field="instruction", response_field="output")
  assert read({"instruction": "a", "input": "c", "output": "b"}, alpaca).prompt == "a\nc"
  assert read({"text": "b"}, Layout(response_field="text")).text == "b"
  completion = Layout(response_field="completion")
  assert read({"prompt": "a", "completion": "b"}, completion).text == "b"
  both = {"prompt": "a", "completion": "b", "response": "c"}
  assert read(both, completion).unread == ("the column 'response' is not read",)
  assert "no column 'complet'; the columns are 'prompt', 'completion'; did you mean completion?" in skipped(
    {"prompt": "a", "completion": "b"}, Layout(response_field="complet"))


@pytest.mark.parametrize(("settings", "message"), [
  ({"format": "alpacca"}, "data.format=alpacca: choose jsonl, .*; did you mean alpaca"),
  ({"columns": {"promt": "q", "response": "a"}}, "data.columns.promt: choose messages, .*; did you mean prompt"),
  ({"columns": {"prompt": "q"}}, "name the column to learn: response, messages or text"),
  ({"columns": {"text": "t", "prompt": "p", "response": "r"}}, "with text, prompt and response would not be read"),
  ({"columns": {"messages": "m", "prompt": "p"}}, "with messages, prompt would not be read"),
  ({"columns": {"prompt": "q", "response": "q"}}, "the column 'q' has two roles"),
  ({"columns": {"text": "t"}, "response_field": "a"}, "data.response_field=a: data.columns names the columns too"),
  ({"columns": {"text": "t"}, "format": "alpaca"}, "data.format=alpaca: data.columns names the columns too"),
  ({"eval_split": "test", "eval_path": "x.jsonl"}, "data.eval_path is set too; remove one"),
  ({"path": ["hub:a/b", "x.jsonl"]}, "a dataset on the hub cannot be in a list"),
  ({"options": {"streeming": True}}, "no such option .* did you mean streaming"),
])
def test_settings_of_files_are_checked(tmp_path, settings, message):
  (tmp_path / "x.jsonl").write_text('{"prompt": "a", "response": "b"}')
  with pytest.raises(InputError, match=message):
    open_source(DataConfig(**{"source": "files", "path": str(tmp_path / "x.jsonl"), **settings}))


def test_a_stated_layout_takes_its_columns(tmp_path):
  row = {"instruction": "a", "output": "b", "prompt": "c", "response": "d"}
  (tmp_path / "x.jsonl").write_text(json.dumps(row))
  for name, texts in {"alpaca": ("a", "b"), "prompt_response": ("c", "d")}.items():
    source = open_source(DataConfig(source="files", path=str(tmp_path / "x.jsonl"), format=name))
    [document] = source.documents()
    assert isinstance(document, Document) and (document.prompt, document.text) == texts


@pytest.mark.parametrize("key", ["arguments", "parameters", "input"])
def test_the_arguments_of_a_call_are_read_by_each_of_their_names(key):
  call = {"type": "function", "function": {"name": "weather", key: {"city": "Rome"}}}
  found = turns({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]})
  [read_call] = found.messages[1]["tool_calls"]
  assert read_call["function"] == {"name": "weather", "arguments": {"city": "Rome"}}
