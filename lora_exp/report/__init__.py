"""The report of a sweep and the plots of a run, made from their files alone: no jax, no network, no display.

    reading     runs and adapters, read from their directories
    statistics  means, differences and fits of numbers by seed
    grouping    runs that differ in their seeds alone are one setting; settings that can be compared are one group
    verdicts    which settings are worse than the best
    findings    sentences, each with its evidence
    plots       figures of one run and of a group
    page        results.csv, report.md, report.html and the tables on the terminal

Each package imports only from those above it. `sweep_report` calls them in this order.
"""
