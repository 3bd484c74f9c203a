"""Measurements of `task=bench`: what the parts of the program cost on this machine."""
