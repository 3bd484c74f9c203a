"""Many runs from one command: grids and studies, packs of runs that share a program, launchers, and the ledger.

What one run does belongs to `train`; parsing of the command line to `cli`.
"""
