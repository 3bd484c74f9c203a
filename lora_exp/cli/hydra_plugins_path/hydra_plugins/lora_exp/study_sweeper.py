"""`hydra/sweeper=study`, which chooses settings from earlier results; see lora_exp/sweep/study/study_runner.py."""

from hydra_plugins.lora_exp.launching_sweeper import LaunchingSweeper


class StudySweeper(LaunchingSweeper):
  """Launches batches of trials, and continues a study that exists already."""

  def sweep(self, arguments: list[str]) -> None:
    """Runs the study and sets the session's outcomes to those of its trials; `arguments` are the typed overrides."""
    from lora_exp.sweep.study import study_runner
    from lora_exp.sweep.study.study_settings import read_study

    parse = self.parser.parse_overrides
    study = read_study(self.node, parse(arguments), parse)
    session = self.session
    session.outcomes = study_runner.run(study, self.directory.absolute(), self.launch, lambda: session.stopped)
