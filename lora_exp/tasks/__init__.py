"""The tasks, one file each: `task=NAME` calls `run(config)` of NAME.py. Shared code is in the other packages."""
