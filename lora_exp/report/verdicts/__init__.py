"""Decisions about the settings of a group: which is best, which are worse, and what keeps that open."""
