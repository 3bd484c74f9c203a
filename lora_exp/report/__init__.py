"""Pictures of a run and the report of a sweep, made from files alone: no jax, no network, no display.

    runs ─► trials ─► settings ─► findings ─► results.csv, report.md, report.html, plots/*.png
    (files)        (seeds are one)  (sentences, each with its evidence)
"""

from lora_exp.report.loss_plots import loss_figure, plot_loss, plot_token_probabilities, running_median

__all__ = ["loss_figure", "plot_token_probabilities", "plot_loss", "running_median"]
