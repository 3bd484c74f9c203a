"""The report of a sweep and the plots of a run, created only from their files: no jax, no network, no display.

    reading     reads runs and adapters from their directories
    estimation  means, differences and fits over seeds
    grouping    settings (runs that differ only in their seeds), and groups of comparable settings
    verdicts    tests which settings are worse than the best
    findings    sentences, each with its evidence
    plots       figures of a run and of a group
    page        results.csv, report.md, report.html and the tables on the terminal

Each package imports only from those above it. `sweep_report` calls them in this order.
"""
