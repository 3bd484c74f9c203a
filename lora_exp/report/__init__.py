"""Pictures of a run and the report of a sweep, made from files alone: no jax, no network, no display.

    runs ─► arms ─► settings ─► findings ─► results.csv, report.md, report.html, plots/*.png
    (files)        (seeds are one)  (sentences, each with its evidence)
"""

from lora_exp.report.loss import loss_figure, plot_answers, plot_loss, running_median

__all__ = ["loss_figure", "plot_answers", "plot_loss", "running_median"]
