"""The names of the files in a run directory and in the directory of a sweep."""

CONFIG = "config.yaml"  # every setting of the run, resolved
METRICS_FILE = "metrics.jsonl"  # one line per logged step
SUMMARY = "summary.json"  # status, losses, parameters, costs
SAMPLES = "samples.jsonl"  # text drawn while training
EVALUATIONS = "evaluations.jsonl"  # results of task=evaluate
ADAPTER = "adapter"  # directory with the adapter in PEFT's format
CHECKPOINTS = "checkpoints"  # directory with orbax checkpoints
HYDRA = ".hydra"  # directory with what Hydra writes
OVERRIDES = "overrides.yaml"  # in HYDRA: the overrides of this run
LOCK = ".lock"  # held while a process writes to the directory

LEDGER = "sweep.jsonl"  # of a sweep: what happened to each trial
MULTIRUN = "multirun.yaml"  # of a sweep: the composed config with Hydra's node
