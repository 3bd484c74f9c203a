"""Training of a pack of trials: plan, program, step, loop, evaluation, checkpoints and the files of a run.

    plan, base, job, compiled_step, loop               how a run is built and trained
    trial, pack_data, pack, pack_training, single_run  trials that share a program, and the run directory of each
    trial_writer, run_summary                          the files of a run
    loaded_run, inspection                             finished runs
    compute       what is compiled: loss, step, optimizer, the arrays of packed adapters
    evaluating    held-out losses
    answers       task metrics: generated answers and choices
    sampling      text generation
    records       checkpoints and what a resumed run needs
    costs         memory, FLOPs and parameters, estimated before training
    loggers       wandb, tensorboard, trackio, mlflow
    merging       merged models
    serving       exports for servers, and the check of what a server answers
    eval_harness  a run as a model of lm-eval
    probing       short measurements before a sweep
    benchmarks    the measurements of task=bench

A config becomes a `Plan`, then a `Job` (arrays), then a `CompiledStep`, then files; each is frozen. Methods and their
leaves belong to `lora`, models to `models`, rows of tokens to `data`, sweeps of many runs to `sweep`.
"""
