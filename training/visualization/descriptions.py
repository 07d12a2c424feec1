"""Pictures with what a language model said of their embeddings, as a file and as a figure."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from matplotlib.figure import Figure
from PIL import Image

from training.errors import DataError
from training.visualization.embeddings import show, title_top, write_lines
from training.visualization.style import IMAGE, NEUTRAL, TEXT, new_figure, wrapped

DESCRIPTIONS_FILE = "descriptions.parquet"

_COLUMNS = 2


@dataclass(frozen=True)
class Described:
    """A picture, small (128, 128, 3), with a question, the answer that is right, and what was said."""

    picture: np.ndarray
    question: str
    answer: str
    description: str


def save_descriptions(described: Sequence[Described], output_dir: str | os.PathLike[str]) -> None:
    """Write them to a run's output directory, as a parquet with embedded pictures; whole or not at all."""
    pictures = []
    for item in described:
        buffer = io.BytesIO()
        Image.fromarray(item.picture).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    columns = {name: [getattr(item, name) for item in described] for name in ("question", "answer", "description")}
    path = Path(output_dir) / DESCRIPTIONS_FILE
    aside = path.with_name(path.name + ".tmp")
    pyarrow.parquet.write_table(pyarrow.table({"image_bytes": pictures} | columns), aside)
    aside.replace(path)


def remove_descriptions(output_dir: str | os.PathLike[str]) -> None:
    """Forget those of the evaluation before, and their figure."""
    for name in (DESCRIPTIONS_FILE, "descriptions.png"):
        (Path(output_dir) / name).unlink(missing_ok=True)


def load_descriptions(output_dir: str | os.PathLike[str]) -> list[Described]:
    """Those of a run's last evaluation; none where it has no file of them.

    Raises:
        DataError: The file is damaged.
    """
    path = Path(output_dir) / DESCRIPTIONS_FILE
    if not path.exists():
        return []
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
        return [
            Described(
                np.asarray(Image.open(io.BytesIO(row["image_bytes"]), formats=["PNG"]).convert("RGB")),
                *(str(row[name]) for name in ("question", "answer", "description")),
            )
            for row in rows
        ]
    except (pyarrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: is damaged: {error}; the next evaluation writes it anew") from error


def descriptions_figure(described: Sequence[Described]) -> Figure:
    """Each picture with what was said of it and, below, what is right; the question where they differ."""
    has_questions = len({item.question for item in described}) > 1
    rows = -(-len(described) // _COLUMNS)
    figure = new_figure(11, 1.25 * rows + 0.4)
    grid = figure.subplots(rows, 2 * _COLUMNS, squeeze=False, width_ratios=[1, 3] * _COLUMNS)
    cells = grid.reshape(-1, 2)
    for (left, right), item in zip(cells, described, strict=False):
        show(left, item.picture)
        lines = [(wrapped(item.question, 52, 2), NEUTRAL)] if has_questions else []
        lines += [(wrapped(item.description, 52, 3) or "(nothing)", TEXT), (wrapped(item.answer, 52, 2), IMAGE)]
        texts, colors = zip(*lines, strict=True)
        write_lines(right, texts, colors, [8.5] * len(lines))
    for axes in cells[len(described) :].flat:
        axes.set_axis_off()
    title_top(figure, "Val pictures, what was said of their embeddings (orange), and what is right (blue)")
    return figure
