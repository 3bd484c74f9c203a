"""One file for each task: `task=NAME` calls `run(config)` of NAME.py. What tasks share lies in the packages before."""
