"""Sweeps in rounds: `hydra/sweeper=rounds` tunes and scores each setting, and `sweep=decide` stops at an answer."""
