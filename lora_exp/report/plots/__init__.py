"""Figures of a run and of a group of settings. They only display results."""
