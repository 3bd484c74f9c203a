"""Adapter files in PEFT's format: reading, writing and validation.

The format of a single method is declared in that method's file, as a `PeftFormat`; it does not belong here.
"""
