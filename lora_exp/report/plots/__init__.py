"""Figures of one run and of a group of settings. They show numbers and decide nothing."""
