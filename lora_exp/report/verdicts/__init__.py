"""Verdicts on the settings of a group: which are sufficient, which are insufficient, and why others are undecided."""
