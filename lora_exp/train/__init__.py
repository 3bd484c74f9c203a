"""Training of a pack of trials: plan, program, step, loop, evaluation, checkpoints and the files of a run.

A config becomes a `Plan`, then a `Job` (arrays), then a `CompiledStep`, then files; each is frozen. Methods and their
leaves belong to `lora`, models to `models`, rows of tokens to `data`, sweeps of many runs to `sweep`.
"""
