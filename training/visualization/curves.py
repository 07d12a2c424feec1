"""Figures of a run's history: losses, recall, learning rate, and recall at every size."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from training.history import Row, series
from training.visualization.style import IMAGE, NEUTRAL, TEXT, THIRD, draw_series, finish_axes, new_figure

STEP_LABEL = "optimizer step"


class NothingToDrawError(ValueError):
    """There is no value for a figure yet."""


def training_curves(rows: Sequence[Row]) -> Figure:
    """Loss of train and val, and R@1 both ways, or of a language model perplexity, over steps."""
    require(rows, "train/loss", "val/loss")
    figure = new_figure(10, 4)
    losses, right = figure.subplots(1, 2)
    draw_series(losses, *series(rows, "train/loss"), "train, mean since the last log", NEUTRAL)
    draw_series(losses, *series(rows, "val/loss"), "val, all sizes", THIRD)
    finish_axes(losses, "Loss", STEP_LABEL, "loss (nats)")
    if any("val/perplexity" in row for row in rows):
        _draw_perplexity(right, rows)
    else:
        _draw_recall(right, rows)
    for axes in (losses, right):
        axes.set_xlim(left=0)
        axes.legend(frameon=False)
    return figure


def _draw_recall(axes: Axes, rows: Sequence[Row]) -> None:
    for name, label, color in (("i2t", "image to text", IMAGE), ("t2i", "text to image", TEXT)):
        steps, shares = series(rows, f"val/{name}_r1")
        draw_series(axes, steps, [100 * share for share in shares], label, color)
    finish_axes(axes, "Retrieval on val, full size", STEP_LABEL, "R@1 (%)")
    axes.set_ylim(0, max(1.0, 1.15 * axes.dataLim.ymax) if np.isfinite(axes.dataLim.ymax) else 1.0)


def _draw_perplexity(axes: Axes, rows: Sequence[Row]) -> None:
    sizes = {int(match[1]) for row in rows for name in row if (match := re.fullmatch(r"val/perplexity@(\d+)", name))}
    draw_series(axes, *series(rows, "val/perplexity"), "whole embedding", IMAGE)
    if sizes:
        smallest = min(sizes)
        draw_series(axes, *series(rows, f"val/perplexity@{smallest}"), f"first {smallest} numbers", TEXT)
    finish_axes(axes, "Answers of val", STEP_LABEL, "perplexity of a token")
    axes.set_yscale("log")  # an untrained bridge is a thousand times worse


def loss_components(rows: Sequence[Row]) -> Figure:
    """CLIP loss, Matryoshka loss and their weighted sum over steps, of train and of val."""
    require(rows, "train/loss_clip", "val/loss_clip")
    figure = new_figure(10, 4)
    for axes, split, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("train", "val"),
        ("Train, mean since the last log", "Val, all Matryoshka sizes"),
        strict=True,
    ):
        for name, label, color in (
            ("loss", "total, weighted sum", NEUTRAL),
            ("loss_clip", "CLIP, full size", IMAGE),
            ("loss_mrl", "MRL, smaller sizes", TEXT),
        ):
            draw_series(axes, *series(rows, f"{split}/{name}"), label, color)
        finish_axes(axes, title, STEP_LABEL, "loss (nats)")
        axes.set_xlim(left=0)
        axes.label_outer()
    axes.legend(frameon=False)
    return figure


def lr_schedule(rows: Sequence[Row]) -> Figure:
    """The learning rate over steps, with the end of the warm-up."""
    require(rows, "train/lr")
    steps, rates = series(rows, "train/lr")
    figure = new_figure(6, 4)
    axes = figure.subplots()
    draw_series(axes, steps, rates, "learning rate", IMAGE, is_noisy=False)
    finish_axes(axes, "Learning rate", STEP_LABEL, "learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    finite = [(rate, -step) for step, rate in zip(steps, rates, strict=True) if math.isfinite(rate)]
    if finite:
        peak, step = max(finite)
        axes.axvline(-step, color=NEUTRAL, linewidth=0.8, linestyle="--")
        axes.annotate(
            f"highest logged: {peak:.3g}, step {-step}",
            (-step, 0),
            xytext=(6, 8),
            textcoords="offset points",
            fontsize=9,
            color=NEUTRAL,
        )
    return figure


def mrl_performance(metrics: Mapping[str, Any], full_dimension: int) -> Figure:
    """R@1 both ways over the size of the embedding, with the share of the full size's that is kept.

    Args:
        metrics: Under the logged names, `val/i2t_r1` and `val/i2t_r1@128`.
        full_dimension: The size that `val/i2t_r1` belongs to.
    """
    require([metrics], "val/i2t_r1")
    sizes = sorted({int(match[1]) for name in metrics if (match := re.fullmatch(r"val/i2t_r1@(\d+)", name))})
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    recalls = {
        way: [100 * metrics[f"val/{way}_r1@{size}"] for size in sizes] + [100 * metrics[f"val/{way}_r1"]]
        for way in ("i2t", "t2i")
    }
    sizes.append(full_dimension)
    above = np.greater_equal(recalls["i2t"], recalls["t2i"])
    for way, label, color, marker in (("i2t", "image to text", IMAGE, "o"), ("t2i", "text to image", TEXT, "s")):
        values = recalls[way]
        axes.plot(sizes, values, color=color, marker=marker, label=label, linewidth=1.6)
        for size, value, i2t_above in zip(sizes, values, above, strict=True):
            on_top = i2t_above == (way == "i2t")
            axes.annotate(
                f"{100 * value / values[-1]:.0f} %" if values[-1] else "none",
                (size, value),
                xytext=(0, 7 if on_top else -14),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=color,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    finish_axes(axes, "Matryoshka: R@1 and the share of the full size's", "numbers of the embedding", "val R@1 (%)")
    highest = max([*recalls["i2t"], *recalls["t2i"]])
    axes.set_ylim(0, max(1.0, 1.15 * highest))
    axes.legend(frameon=False, loc="lower right")
    return figure


def require(rows: Sequence[Mapping[str, Any]], *names: str) -> None:
    """Raise unless some row has one of the names."""
    if not any(name in row for row in rows for name in names):
        raise NothingToDrawError(f"the history has no {' and no '.join(names)} to draw")
