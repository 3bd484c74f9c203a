"""The command line: parses arguments, composes and checks a config per job, runs Hydra, and returns an exit code.

Tasks are implemented in `tasks`, and sweeps in `sweep`.
"""
