"""Sweeps in rounds: `hydra/sweeper=rounds` tunes each setting and scores it, and `sweep=decide` stops when it knows."""
