"""Grids of jobs, and which of their trials train as one program."""
