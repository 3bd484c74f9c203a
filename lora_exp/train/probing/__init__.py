"""Short measurements before a sweep, for `task=advise`, and probabilities of single tokens."""
