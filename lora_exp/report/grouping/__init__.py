"""Grouping: runs that differ only in their seeds are one setting, and comparable settings are one group."""
