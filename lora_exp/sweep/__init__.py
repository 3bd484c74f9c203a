"""Sweeps of many runs: grids and studies, packs of runs that share a program, launchers, and the ledger.

    sweep_run, ledger  a run as Hydra composed it, and what happened to each trial
    packs              grids of jobs, and which of their trials train as one program
    rounds             tuning, then scoring; and sweeps that stop when the answer is known
    study              settings that Optuna chooses
    remote             runs and packs as jobs of joblib, Ray and SLURM

The training of a single run or pack belongs to `train`, and parsing of the command line to `cli`.
"""
