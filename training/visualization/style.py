"""One look for every figure: the palette, axes, and text that comes from captions."""

import os
import re
import textwrap
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

# The palette of Okabe and Ito (2008, jfly.uni-koeln.de/color), which colour-blind people can tell apart. A colour has
# one meaning in every figure: pictures and image-to-text, text and text-to-image, and what is neither.
IMAGE, TEXT, THIRD, NEUTRAL = "#0072B2", "#D55E00", "#009E73", "#767676"
HEAT = "cividis"  # even for all kinds of colour vision, from dark blue to yellow

DPI = 110  # pixels per inch
THUMBNAIL = 128  # pixels, side of a small picture
MANY_POINTS = 60  # from here on single points are no longer marked


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, width and height in inches; no global state, no display."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def finish_axes(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, names with units, a light grid, and no box around it."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def draw_series(
    axes: Axes, steps: Sequence[int], values: Sequence[float], label: str, color: str, *, is_noisy: bool = True
) -> None:
    """A line over steps; what is not finite leaves a gap, and is counted in the label.

    Many noisy values are drawn faintly, and their running mean over them.
    """
    array = np.asarray(values, dtype=float)
    missing = int((~np.isfinite(array)).sum())
    array = np.where(np.isfinite(array), array, np.nan)
    label = f"{label} ({missing} not finite)" if missing else label
    if len(array) <= MANY_POINTS:
        axes.plot(steps, array, color=color, label=label, linewidth=1.6, marker="o", markersize=3.5)
    elif is_noisy:
        axes.plot(steps, array, color=color, alpha=0.3, linewidth=0.8)
        axes.plot(steps, running_mean(array, len(array) // 20), color=color, label=label, linewidth=1.8)
    else:
        axes.plot(steps, array, color=color, label=label, linewidth=1.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean of the finite values among the `width` on either side, at every place; NaN where there is none."""
    finite = np.isfinite(values)
    window = np.ones(2 * width + 1)
    counts = np.convolve(finite, window, mode="full")[width : width + len(values)]
    sums = np.convolve(np.where(finite, values, 0.0), window, mode="full")[width : width + len(values)]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def short(caption: str, length: int) -> str:
    """A caption in one line of at most `length` characters, safe for matplotlib."""
    return _escape(_cut(caption, length))


def wrapped(caption: str, width: int, max_lines: int) -> str:
    """A caption in at most `max_lines` lines of at most `width` characters, safe for matplotlib."""
    return _escape("\n".join(textwrap.wrap(_cut(caption, width * max_lines), width)[:max_lines]))


def _escape(text: str) -> str:
    return text.replace("$", r"\$")  # it would begin a formula


def _cut(caption: str, length: int) -> str:
    """Without control characters and line breaks, and with an ellipsis where something is left out."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", caption).strip()
    if len(line) > length:
        line = line[: length - 1].rstrip() + "…"
    return line


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a PNG; letters that the font lacks (emoji, many scripts) become boxes without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, format="png")


def thumbnail(picture: Image.Image) -> np.ndarray:
    """A picture in the middle of a white square; also where it is as thin as a line."""
    scale = THUMBNAIL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    square = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white")
    square.paste(picture.resize((width, height)), ((THUMBNAIL - width) // 2, (THUMBNAIL - height) // 2))
    return np.asarray(square)
