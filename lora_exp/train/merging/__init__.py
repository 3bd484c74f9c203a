"""Merged models: their directory, and the check that merging changes no logit by more than its bound."""
