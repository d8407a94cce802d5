"""Plots a training run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hf_mel.errors import MissingExtraError


def plot_training(log: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Plots the training loss and the validation metrics over the epochs, to an image file.

    Args:
        log (sequence of mappings): The Trainer's `state.log_history`: entries with `epoch` and `loss`, or with `epoch`,
            `eval_mrr` and `eval_hits@1` (fractions).
        path (`str` or `os.PathLike`): The image file. Its suffix sets the format.
        title (`str`, *optional*): Title of the plot.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError(
            "The plot needs matplotlib, which is not installed.", remedy='Run pip install "hf_mel[plot]".'
        ) from None
    figure = Figure(figsize=(7, 4), layout="constrained")  # pyplot would need a display and keep global state
    loss_axis = figure.subplots()
    losses = [entry for entry in log if "loss" in entry]
    handles = loss_axis.plot(
        [entry["epoch"] for entry in losses], [entry["loss"] for entry in losses], color="0.5", label="loss"
    )
    loss_axis.set(xlabel="epoch", ylabel="training loss", title=title)
    loss_axis.set_ylim(bottom=0)
    evaluations = [entry for entry in log if "eval_mrr" in entry]
    if evaluations:
        metric_axis = loss_axis.twinx()
        epochs = [entry["epoch"] for entry in evaluations]
        for key, label, colour in (("eval_mrr", "MRR", "C0"), ("eval_hits@1", "H@1", "C1")):
            values = [100 * entry[key] for entry in evaluations if key in entry]
            handles += metric_axis.plot(epochs[: len(values)], values, "o-", color=colour, label=label)
        metric_axis.set(ylabel="validation, %", ylim=(0, 100))
    loss_axis.legend(handles=handles, loc="center right")
    figure.savefig(path, dpi=120)
