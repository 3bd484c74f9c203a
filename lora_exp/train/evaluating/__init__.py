"""Held-out losses: sums by metric, losses of each document, and their files."""
