"""Runs and adapters, read from their directories. What they mean is not decided here."""
