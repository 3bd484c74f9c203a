"""Sweeps of many runs: grids and studies, packs of runs that share a program, launchers, and the ledger.

The training of a single run or pack belongs to `train`, and parsing of the command line to `cli`.
"""
