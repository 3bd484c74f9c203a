"""Reads runs and adapters from their directories, without interpreting them."""
