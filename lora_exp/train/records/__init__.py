"""What a run needs to go on: checkpoints, the record of its metrics, and the checks of a resumed run."""
