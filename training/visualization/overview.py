"""Figures of what goes into a run: pairs, lengths of captions, and the parts of the model."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from PIL import Image
from torch import nn

from modeling_edgeglass import EdgeGlassModel
from training.visualization.embeddings import show
from training.visualization.style import IMAGE, NEUTRAL, TEXT, THIRD, finish_axes, new_figure, wrapped


def pairs_grid(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = 6) -> Figure:
    """Pictures with the beginning of their captions below.

    Args:
        pictures: RGB pictures of any size.
        captions: Caption i belongs to picture i.
        columns: Pictures in a row.
    """
    rows = -(-len(pictures) // columns)
    figure = new_figure(1.9 * columns, 2.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid:
        axes.set_axis_off()
    for axes, picture, caption in zip(grid, pictures, captions, strict=False):
        axes.set_axis_on()
        show(axes, np.asarray(picture))
        axes.set_xlabel(wrapped(caption, 24, 3), fontsize=8)
    return figure


def caption_lengths(lengths: Sequence[int], max_text_length: int) -> Figure:
    """A histogram of captions' lengths in tokens, with the length that they are cut at."""
    figure = new_figure(6, 3.2)
    axes = figure.subplots()
    axes.hist(lengths, bins=min(40, max(1, len(set(lengths)))), color=TEXT)
    cut = sum(length > max_text_length for length in lengths)
    if cut:
        axes.axvline(max_text_length, color=NEUTRAL, linestyle="--", linewidth=1)
    title = f"{len(lengths)} captions, median {np.median(lengths):.0f} tokens; cut at {max_text_length}: {cut} of them"
    finish_axes(axes, title, "length (tokens)", "captions")
    return figure


def model_parts(model: EdgeGlassModel) -> Figure:
    """The two towers as boxes from input to embedding: what is frozen, what trains, and how many parameters it has."""
    figure = new_figure(9.5, 3.6)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set(xlim=(0, 10), ylim=(0, 4))
    sides = ((3.2, "pictures", model.vision_encoder, IMAGE), (1.2, "captions", model.text_encoder, TEXT))
    for y, source, encoder, color in sides:
        axes.text(0.1, y, source, va="center", fontsize=10, color=color)
        parts: list[tuple[str, nn.Module | None]] = [
            (type(encoder.backbone).__name__, encoder.backbone),
            (type(encoder.pooling).__name__ if encoder.pooling is not None else "mean or pooler", encoder.pooling),
            (f"projection to {model.config.projection_dim}", encoder.projection),
        ]
        for x, (name, part) in zip((2.5, 5.15, 7.8), parts, strict=True):
            _draw_part(axes, x, y, name, part)
        for start, end in ((1.15, 1.3), (3.7, 3.95), (6.35, 6.6)):
            axes.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "->", "color": NEUTRAL})
        axes.annotate("", (9.45, 2.2), (9.0, y), arrowprops={"arrowstyle": "->", "color": NEUTRAL})
    axes.text(9.5, 2.2, "same\nspace", va="center", fontsize=9)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    axes.set_title(
        f"{trained / 1e6:.1f} of {total / 1e6:.1f} million parameters train (green); grey is frozen",
        fontsize=11,
        loc="left",
    )
    return figure


def _draw_part(axes: Axes, x: float, y: float, name: str, part: nn.Module | None) -> None:
    parameters = [] if part is None else list(part.parameters())
    count = sum(p.numel() for p in parameters)
    color = THIRD if any(p.requires_grad for p in parameters) else NEUTRAL
    axes.add_patch(
        FancyBboxPatch(
            (x - 1.1, y - 0.5), 2.2, 1.0, boxstyle="round,pad=0.08", facecolor=color, alpha=0.18, edgecolor=color
        )
    )
    size = f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"
    axes.text(x, y, f"{name}\n{size} parameters", ha="center", va="center", fontsize=8.5)
