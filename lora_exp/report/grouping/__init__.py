"""Runs that differ in their seeds alone are one setting; settings that can be compared are one group."""
