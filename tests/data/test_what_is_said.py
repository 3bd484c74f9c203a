"""What a run does not learn, or learns twice, is said before training."""

import json
from pathlib import Path

import pytest
from corpora import BYTES, PAIRS, jsonl_file
from tokenizer_files import CHATML, byte_level

from lora_exp.config.errors import InputError
from lora_exp.config.schema import DataConfig
from lora_exp.data.chats.conversations import encode_conversations
from lora_exp.data.documents import Conversation, Document
from lora_exp.data.encoding import source_writer
from lora_exp.data.encoding.encode import encode_documents
from lora_exp.data.encoding.row_counts import RowCounts
from lora_exp.data.formats import json_rows, layouts
from lora_exp.data.formats.csv_rows import find_delimiter
from lora_exp.data.rows import make_rows
from lora_exp.data.sources import data_facts, open_source
from lora_exp.data.tokenization import get_tokenizer

TURNS = ({"role": "user", "content": "cat"}, {"role": "assistant", "content": "The cat sat."},
         {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "To rest."})


def config(path: object, **settings) -> DataConfig:
  return DataConfig(**{"source": "files", "path": path, "eval_fraction": 0.5, "seq_len": 64, **settings})


def rows_of(folder: Path, path: object, **settings) -> RowCounts:
  return make_rows(config(path, **settings), BYTES, folder / "cache", progress=False)


def said(folder: Path, rows: list, **settings) -> str:
  """The warnings about a file of JSON lines."""
  return "\n".join(rows_of(folder, jsonl_file(folder, rows), **settings).warnings)


# ---- what a chat template leaves out


def problems(folder: Path, template: str, conversation: Conversation, plain: bool = False) -> dict:
  tokenizer = get_tokenizer(str(byte_level(folder, chat_template=template)))
  [one] = encode_conversations(tokenizer, [conversation], "assistant", plain)
  return dict(one.problems)


@pytest.mark.parametrize(("key", "value", "other"), [
  ("name", "cat", "'<' + (m.name or '') + '>'"), ("documents", [{"a": "cat"}], "(m.documents | default('') | tojson)")])
def test_keys_that_a_template_leaves_out_are_counted(tmp_path, key, value, other):
  turns = ({**TURNS[0], key: value}, *TURNS[1:])
  reason = f"the chat template leaves out the key {key!r} in messages of the user"
  assert problems(tmp_path / "a", CHATML, Conversation(turns)) == {("turns", reason): 1}
  written = CHATML.replace("message['content']", f"({other.replace('m.', 'message.')}) + message['content']")
  assert problems(tmp_path / "b", written, Conversation(turns)) == {}


def test_a_turn_whose_text_also_stands_elsewhere_is_missed(tmp_path):
  dropped = CHATML.replace("message['content']", "(message['content'] if not loop.first else '')")
  reason = "the chat template changes the text of the user, or leaves it out"
  assert problems(tmp_path, dropped, Conversation(TURNS)) == {("turns", reason): 1}
  tokenizer = get_tokenizer(str(tmp_path))
  [pair] = encode_documents(tokenizer, [Document(0, "The cat sat.", "cat")], DataConfig(), "")
  assert dict(pair.problems) == {("turns", reason): 1}


def test_marks_for_which_templates_search_stay_whole(tmp_path):
  searching = CHATML.replace("message['content']", (
    "(message['content'] if not message['content'].startswith('<t>') or message['content'].endswith('</t>') else '')"))
  turns = ({"role": "user", "content": "<t>cat</t>\n"}, *TURNS[1:])
  assert problems(tmp_path, searching.replace(".endswith", ".strip().endswith"), Conversation(turns)) == {}


def test_variables_that_a_template_does_not_read_are_named(tmp_path):
  conversation = Conversation(TURNS, variables={"enable_thinking": True, "style": "short"})
  reads = "{% if enable_thinking %}{% endif %}" + CHATML
  reason = "the chat template leaves out the variable 'style' of chat_template_kwargs"
  assert problems(tmp_path, reads, conversation) == {("conversations", reason): 1}


def test_without_a_template_nothing_is_blamed_on_one(tmp_path):
  conversation = Conversation(({**TURNS[0], "name": "x"}, *TURNS[1:]), tools=({"function": {"name": "f"}},))
  found = problems(tmp_path, CHATML, conversation, plain=True)
  subject = "the format without a chat template leaves out"
  assert found == {("turns", f"{subject} the key 'name' in messages of the user"): 1,
                   ("conversations", f"{subject} their tools"): 1}


def test_the_name_of_a_called_tool_may_be_left_out(tmp_path):
  call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
  calling = {"role": "assistant", "content": "", "tool_calls": [call]}
  turns = (TURNS[0], calling, {"role": "tool", "content": "5"}, TURNS[1])
  template = CHATML.replace("message['content']", "(message.content or message.tool_calls | tojson)")
  for name, count in {"f": 0, "g": 1}.items():
    named = (*turns[:2], {**turns[2], "name": name}, turns[3])
    reason = "the chat template leaves out the key 'name' in messages of the tool"
    assert problems(tmp_path / name, template, Conversation(named)) == ({("turns", reason): 1} if count else {})


def test_reasoning_and_text_are_told_apart(tmp_path):
  turns = (TURNS[0], {**TURNS[1], "reasoning_content": "It is tired."})
  reason = "the chat template changes the reasoning of the assistant, or leaves it out"
  assert problems(tmp_path / "a", CHATML, Conversation(turns)) == {("turns", reason): 1}
  written = CHATML.replace("message['content']", "(message.reasoning_content or '') + message['content']")
  assert problems(tmp_path / "b", written, Conversation(turns)) == {}


def test_templates_that_expect_arguments_as_text_get_it(tmp_path):
  call = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
  turns = (TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]})
  joined = "message.content + (message.tool_calls[0].function.name + ' ' + message.tool_calls[0].function.arguments)"
  template = CHATML.replace("message['content']", f"({joined} if message.tool_calls else message.content)")
  tokenizer = get_tokenizer(str(byte_level(tmp_path, chat_template=template)))
  [one] = encode_conversations(tokenizer, [Conversation(turns)], "assistant", plain=False)
  assert 'f {"x": "é"}<|im_end|>' in tokenizer.decode(one.ids) and one.problems == {}
  with pytest.raises(InputError, match="the chat template of .* fails"):
    encode_conversations(tokenizer, [Conversation(({"role": "user", "content": None}, TURNS[1]))], "last", plain=False)


# ---- copies


def test_documents_that_occur_twice_are_counted(tmp_path):
  rows = [*PAIRS[:4], PAIRS[0], PAIRS[1], PAIRS[2], PAIRS[0]]  # one of two rows is held out
  told = said(tmp_path, rows)
  assert "2 of 4 training documents are copies of others" in told
  assert "1 of 4 held-out documents are training documents too" in told
  assert "training documents" not in said(tmp_path, PAIRS)


def test_a_held_out_file_with_rows_of_the_training_file(tmp_path):
  learned = jsonl_file(tmp_path, PAIRS[:6], "a.jsonl")
  (tmp_path / "b.csv").write_text("question,answer\n" + "".join(f"{p['prompt']},{p['response']}\n" for p in PAIRS[4:]))
  told = "\n".join(rows_of(tmp_path, learned, eval_path=str(tmp_path / "b.csv")).warnings)
  assert "2 of 6 held-out documents are training documents too" in told


def test_files_with_the_same_content_are_named(tmp_path):
  paths = [jsonl_file(tmp_path, rows, name) for name, rows in
           {"a.jsonl": PAIRS, "b.jsonl": PAIRS[::-1], "c.jsonl": PAIRS}.items()]
  facts = data_facts(config(paths))
  assert str(facts["data.path"]) == f"{paths[2]} is a copy of {paths[0]}, so its rows are learned twice"
  assert "data.path" not in data_facts(config(paths[:2]))


# ---- rows that are not read


def test_rows_after_the_limit_are_counted(tmp_path, monkeypatch):
  assert "6 of 10 rows: they follow after data.limit=4" in said(tmp_path, PAIRS, limit=4)
  assert "data.limit" not in said(tmp_path, PAIRS, limit=10)
  (tmp_path / "x.txt").write_text("<|endoftext|>".join("abcdef"))
  [told] = rows_of(tmp_path, str(tmp_path / "x.txt"), limit=4).warnings
  assert "2 of 6 rows: they follow after data.limit=4" in told
  monkeypatch.setattr(source_writer, "MOST_COUNTED", 3)
  more = jsonl_file(tmp_path, [*PAIRS, PAIRS[0]], "more.jsonl")
  told = "\n".join(rows_of(tmp_path, more, limit=4).warnings)
  assert "4 of 8 rows: they follow after data.limit=4, and so do others that were not counted" in told


def test_an_error_after_the_limit_does_not_matter(tmp_path):
  path = Path(jsonl_file(tmp_path, PAIRS * 3))
  path.write_bytes(path.read_bytes() + b"\n\xff\n")
  told = "\n".join(rows_of(tmp_path, str(path), limit=4).warnings)
  assert "they follow after data.limit=4, and so do others" in told


def test_rows_with_different_columns_are_told(tmp_path):
  rows = [*PAIRS, *({"question": f"{n}?", "answer": "x"} for n in range(3)), {"messages": list(TURNS)}, {"text": "abc"}]
  assert ("documents are read from different columns: 10 from 'prompt' and 'response'; 3 from 'question' and 'answer'; "
          "1 from 'messages'; 1 from 'text'") in said(tmp_path, rows)
  assert "different columns" not in said(tmp_path, PAIRS)


@pytest.mark.parametrize(("row", "reason"), [
  ({"prompt": "a", "response": " \n"}, "the response contains only white space"),
  ({"prompt": "a", "response": ""}, "the response is empty, and only its end is learned"),
  ({"prompt": " ", "response": "b"}, "the prompt contains only white space"),
  ({"text": "\t "}, "the text contains only white space"),
  ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "an answer is empty, and only its end is learned"),
  ({"messages": [{"role": "user", "content": ""}, TURNS[1]]}, "a user turn is empty"),
])
def test_white_space_is_not_taken_for_a_text(tmp_path, row, reason):
  assert f"1 of 11 rows: {reason} (first: corpus.jsonl, line 11)" in said(tmp_path, [*PAIRS, row])


@pytest.mark.parametrize("cut", [5, 20])
def test_a_row_at_which_a_file_breaks_off(tmp_path, cut):
  path = Path(jsonl_file(tmp_path, PAIRS))
  path.write_text(path.read_text().rstrip()[:-cut])
  told = "\n".join(rows_of(tmp_path, str(path)).warnings)
  assert "1 of 10 rows: the file ends inside this row, perhaps because a download broke off" in told
  array = tmp_path / "x.json"
  array.write_text(json.dumps(PAIRS)[:-cut])
  with pytest.raises(InputError, match="the file ends before its last value does"):
    rows_of(tmp_path, str(array))


def test_rows_of_more_than_the_bound_are_left_out(tmp_path, monkeypatch):
  monkeypatch.setattr(json_rows, "LONGEST_LINE", 2000)
  monkeypatch.setattr(layouts, "LONGEST", 1000)
  line, row = {"prompt": "a", "response": "b" * 5000}, {"prompt": "a", "response": "b" * 1500}
  told = said(tmp_path, [*PAIRS[:5], line, row, *PAIRS[5:]])
  assert "1 of 12 rows: the line has more than 2,000 bytes; split the row (first: corpus.jsonl, line 6: 5,0" in told
  assert "1 of 12 rows: the row has more than 1,000 characters; split it (first: corpus.jsonl, line 7" in told


# ---- tables and objects


def test_a_delimiter_is_found_from_names_and_rows():
  assert find_delimiter("prompt;response, or none\n", "a;b\n") == ";"
  assert find_delimiter("a,b;c,d;e\n", "1;2,5;3\n4;5,5;6\n") == ";"
  assert find_delimiter('a|"b,c,d,e"\n', '1|"2,3"\n') == "|"
  assert find_delimiter("text\n", "Hello, you; there\n") == ","


def test_another_delimiter_is_named_and_can_be_given(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("question^answer, short\n" + "".join(f"{n}?^{n}, yes\n" for n in range(4)))
  with pytest.raises(InputError, match=r"the delimiter is ',' \(data.options.delimiter names another\)"):
    open_source(config(str(path)))
  columns = {"prompt": "question", "response": "answer, short"}
  source = open_source(config(str(path), columns=columns, options={"delimiter": "^"}))
  assert [(one.prompt, one.text) for one in source.documents()] == [(f"{n}?", f"{n}, yes") for n in range(4)]
  with pytest.raises(InputError, match="data.options.delimiter=ab: must be one character"):
    open_source(config(str(path), options={"delimiter": "ab"}))


@pytest.mark.parametrize("names", ["0123456789", "abcdefghij"])
def test_an_object_may_name_its_rows(tmp_path, names):
  (tmp_path / "x.json").write_text(json.dumps(dict(zip(names, PAIRS, strict=True)), indent=1))
  documents = list(open_source(config(str(tmp_path / "x.json"))).documents())
  assert [(one.prompt, one.text) for one in documents] == [(pair["prompt"], pair["response"]) for pair in PAIRS]
  assert documents[1].where == f"x.json, row {names[1]!r}"
