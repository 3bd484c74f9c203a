"""What the data or the settings rule out is refused in one sentence, before a base is made and a table is shown."""

import pytest
from runs import TINY, stories, train

METRIC = "def score(prediction, reference, prompt):\n  return 1\n"
PRETRAINED = ["model.base=pretrain", "model.pretrain.steps=2", "model.pretrain.warmup=0"]
SAMPLED = [word for word in TINY if word != "sample=none"]


@pytest.mark.parametrize(("settings", "words"), [
  (["data.seq_len=8", "train.batch_size=1", "train.steps=null", "train.epochs=1e6"], "at most 2,147,483,647 steps"),
  (["eval.metrics=[exact_match]"], "have no whole answer to a prompt"),
  (["eval.metric_file={0}/broken.py"], "cannot be loaded: ModuleNotFoundError"),
  (["sample.chat=always"], "has no chat template"),
  (['sample.prompts=["' + "a long prompt " * 99 + '"]'], "leaves no room for another"),
  (["data.eval_path={0}/empty.txt"], "contains no text"),
])  # fmt: skip
def test_a_run_is_refused_before_its_base_is_made(settings, words, tmp_path, capfd):
  (tmp_path / "broken.py").write_text("import no_such_package\n" + METRIC)
  (tmp_path / "empty.txt").write_text("")
  data = ["data=text", f"data.path={stories(tmp_path / 'stories.txt', 400)}", "data@pretrain_data=text",
          f"pretrain_data.path={tmp_path / 'stories.txt'}"]  # fmt: skip
  argv = [*SAMPLED, *PRETRAINED, *data, f"cache={tmp_path / 'cache'}"]
  train(tmp_path / "run", *argv, *(word.format(tmp_path) for word in settings), code=2)
  shown = capfd.readouterr()
  assert words in shown.err and len(shown.err.splitlines()) <= 3, shown.err
  assert "Adapted modules" not in shown.out and not (tmp_path / "cache" / "base").exists()
  assert not (tmp_path / "run").exists()
