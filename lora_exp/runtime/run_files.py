"""The names of the files in a run directory and in the directory of a sweep."""

CONFIG = "config.yaml"  # every setting of the run, resolved
METRICS_FILE = "metrics.jsonl"  # one line per logged step
HELD_OUT_FILE = "held_out.npz"  # losses of each held-out document
SUMMARY = "summary.json"  # status, losses, parameters, costs
SAMPLES = "samples.jsonl"  # text sampled during training
EVALUATIONS = "evaluations.jsonl"  # results of task=evaluate
HARNESS = "harness.jsonl"  # results of task=evaluate harness=TASK
ADAPTER = "adapter"  # directory with the adapter in PEFT's format
CHECKPOINTS = "checkpoints"  # directory with orbax checkpoints
HYDRA = ".hydra"  # directory with Hydra's files
OVERRIDES = "overrides.yaml"  # in HYDRA: the overrides of this run
LOCK = ".lock"  # locked while a process writes to the directory

OUTPUTS = "outputs"  # directory of all runs and sweeps

LEDGER = "sweep.jsonl"  # of a sweep: the events of its trials
MULTIRUN = "multirun.yaml"  # of a sweep: the composed config with the node `hydra`
