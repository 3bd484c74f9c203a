"""Commands that are killed again and again go on bit for bit: runs, bases, packs of eight, studies and decisions."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from forked import start_command
from kills import BASE, FINISHING, LEDGER, ROWS, SAVING, Command, compare, run_killed, shared_programs
from runs import TINY, cache, on_stories

SHORT = [*TINY, "lora.dropout=0.1", "train.eval_tokens=500", "train.batch_size=4", "optim.warmup=3"]
RUN = [*SHORT, "train.steps=40", "train.eval_every=8", "train.save_every=4"]
SWEEP = [*SHORT, "lora.dropout=0", "train.steps=12", "train.eval_every=4", "train.save_every=4"]
PRETRAINED = [*RUN, "model.base=pretrain", "model.pretrain.steps=40", "model.pretrain.warmup=2"]


def begin(argv: list[str], directory: Path, root: Path) -> list[str]:
  return [*argv, f"hydra.run.dir={directory}", f"cache={root}"]


def resume(directory: Path, root: Path) -> list[str]:
  return [f"train.resume={directory}", f"cache={root}"]


def sweep(argv: list[str], directory: Path, root: Path) -> list[str]:
  return [*argv, f"hydra.sweep.dir={directory}", f"cache={root}"]


def single(argv: list[str], places: list, lines: int, visits: Sequence[int] = (1, 1, 2, 3)) -> Command:
  return Command(partial(begin, argv), resume, places, lines, visits)


def repeated(argv: list[str], lines: int) -> Command:
  start = partial(sweep, argv)
  return Command(start, start, [*SAVING, *FINISHING, *LEDGER], lines)


def a_run(text: list[str]) -> Command:
  return single([*RUN, *text], [*SAVING, *FINISHING], 47)


def a_pretrained_run(text: list[str]) -> Command:
  pretraining = ["data@pretrain_data=text", f"pretrain_{text[1]}"]
  return single([*PRETRAINED, *text, *pretraining], [*ROWS, *BASE], 20, visits=[1])


def a_pack_of_eight(text: list[str]) -> Command:
  return repeated(["-m", "hydra/launcher=packed", *SWEEP, *text, "lora.rank=1,2,3,4", "train.seed=0,1"], 8 * 16)


def a_study(text: list[str]) -> Command:
  return repeated(["-m", "hydra/sweeper=study", "hydra/launcher=packed", *SWEEP, *text, "lora.rank=choice(2,4)",
                   "optim.lr=tag(log,interval(1e-3,1e-1))", "hydra.sweeper.width=3", "hydra.sweeper.n_trials=6",
                   "hydra.sweeper.rungs=[4]"], 60)  # fmt: skip


def a_decision(text: list[str]) -> Command:
  return repeated(["sweep=decide", *SWEEP, *text, "lora.rank=1,4", "hydra.sweeper.decide.looks=[3]",
                   "hydra.sweeper.tune.factors=[1,2]", "hydra.sweeper.tune.extend=0", "hydra.sweeper.extra=null"],
                  160)  # fmt: skip


def kill_and_compare(
  make: Callable[[list[str]], Command], kills: int, seeds: Sequence[int], tmp_path: Path,
  record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
  """Kills a command `kills` times for each of the `seeds`, and compares what it left with an unbroken one."""
  command, programs = make(on_stories(tmp_path)), cache() / "programs"
  unbroken = tmp_path / "unbroken"
  process = start_command(
    command.start(unbroken, shared_programs(tmp_path / "cache", programs)), tmp_path / "unbroken.log"
  )
  process.join()
  assert process.exitcode == 0, (tmp_path / "unbroken.log").read_text()[-3000:]
  for seed in seeds:
    killed = tmp_path / f"killed{seed}"
    root = shared_programs(tmp_path / f"killed{seed}_cache" / "cache", programs)
    count = run_killed(command, killed, root, kills, random.Random(seed))
    compare(unbroken, killed, count)
    row = count.row(make.__name__.replace("_", " "))
    record_property("fault_count", row)
    print(row, dict(count.places), count.failed)
    assert (count.failed, count.differing) == ([], 0), (killed.with_suffix(".log")).read_text()[-6000:]
    assert count.losses >= 30


@pytest.mark.parametrize("make", [
  a_run, pytest.param(a_pretrained_run, marks=pytest.mark.slow), pytest.param(a_pack_of_eight, marks=pytest.mark.slow)
])  # fmt: skip
def test_a_killed_command_goes_on_bit_for_bit(make, tmp_path, record_property):
  kill_and_compare(make, 2, [0], tmp_path, record_property)


@pytest.mark.faults_full
@pytest.mark.parametrize(("make", "kills", "times"), [
  (a_run, 6, 12), (a_pretrained_run, 3, 16), (a_pack_of_eight, 6, 8), (a_study, 6, 4), (a_decision, 6, 4),
])  # fmt: skip
def test_commands_killed_two_hundred_times_in_all(make, kills, times, tmp_path, record_property, first_seed):
  kill_and_compare(make, kills, range(first_seed, first_seed + times), tmp_path, record_property)
