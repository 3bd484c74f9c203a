"""The tasks, one file each: `task=NAME` calls `run(config)` of NAME.py. Shared code is in the other packages.

Where a library is called NAME, such as inspect, the file is NAME_task.py.
"""
