"""The command line: from what is typed to a checked config for each job, through Hydra, to an exit code.

Here belongs everything that reads the command line, composes configs, checks them against files, and runs tasks. What
a task does belongs into `tasks`; what a sweep consists of, into `sweep`.
"""
