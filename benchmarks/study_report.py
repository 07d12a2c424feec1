"""The study's cells as tables, in docs/recipes.md for statistics pooling and in docs/study.md for all, and a plot.

    python benchmarks/study_report.py

Reads benchmarks/study.jsonl, complete or not; a row tells how many seeds it has.
"""

import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.study import DATA_SETS, POOLINGS, SHOWN, Cell, read_cells  # noqa: E402
from training.visualization.style import IMAGE, NEUTRAL, TEXT, THIRD, finish_axes, new_figure, save_figure  # noqa: E402

DOCUMENTS = {ROOT / "docs" / "recipes.md": ("statistics",), ROOT / "docs" / "study.md": POOLINGS}
PLOT = ROOT / "docs" / "study.png"
BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"

# How a line of the table is called, the start of its cells, which epoch of them, and its colour.
WAYS = {
    "random, then contrastive": ("random", "last", IMAGE),
    "spectral": ("spectral", "first", THIRD),
    "spectral, then contrastive": ("spectral", "last", TEXT),
    "sentence-transformers": ("sentence-transformers", "last", NEUTRAL),
}


@dataclass(frozen=True)
class Line:
    """R@1 in percent at every shown size, per seed, of one way on one set."""

    data: str
    concepts: int | None
    pooling: str
    way: str
    pairs: int
    recalls: Sequence[Sequence[float]]
    seconds: Sequence[float]

    def mean(self, size: int) -> float:
        """Over seeds."""
        return statistics.mean(recall[SHOWN.index(size)] for recall in self.recalls)

    def spread(self, size: int) -> float:
        """Standard deviation over seeds; 0 of a single one."""
        values = [recall[SHOWN.index(size)] for recall in self.recalls]
        return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    found = list(lines(read_cells()))
    draw(found)
    for document, poolings in DOCUMENTS.items():
        before, _, rest = document.read_text().partition(BEGIN)
        rows = table([line for line in found if line.pooling in poolings])
        document.write_text(f"{before}{BEGIN}\n{rows}\n{END}{rest.partition(END)[2]}")


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[Line]:
    """All that have a cell, in the order of the study."""
    cells = [(Cell(**row["cell"]), row) for row in rows]
    sets = [(name, concepts) for name, settings in DATA_SETS.items() for concepts in settings.sizes]
    for data, concepts in sets:
        for pooling in POOLINGS:
            for way, (start, epoch, _) in WAYS.items():
                group = [
                    row
                    for cell, row in cells
                    if (cell.data, cell.concepts, cell.pooling, cell.start) == (data, concepts, pooling, start)
                ]
                if group:
                    chosen = [row["epochs"][{"first": 0, "last": -1, "best": row["best"]}[epoch]] for row in group]
                    recalls = [[result[str(size)] for size in SHOWN] for result in chosen]
                    seconds = [row["seconds"] for row in group]
                    yield Line(data, concepts, pooling, way, group[0]["pairs"], recalls, seconds)


def table(found: Sequence[Line]) -> str:
    """In Markdown; the best way of a set and size is bold."""
    header = "| data | pairs | pooling | start | " + " | ".join(map(str, SHOWN)) + " | seeds |"
    out = [header, "|---|---:|---|---|" + "---:|" * (len(SHOWN) + 1)]
    for line in found:
        rivals = [other for other in found if (other.data, other.concepts) == (line.data, line.concepts)]
        cells = []
        for size in SHOWN:
            text = f"{line.mean(size):.1f} ± {line.spread(size):.1f}"
            is_best = line.mean(size) == max(rival.mean(size) for rival in rivals)
            cells.append(f"**{text}**" if is_best else text)
        named = [line.data, str(line.pairs), line.pooling, line.way]
        out.append(f"| {' | '.join(named + cells)} | {len(line.recalls)} |")
    return "\n".join(out)


def draw(found: Sequence[Line]) -> None:
    """R@1 over the number of pairs: a column per data set with several sizes, a row per size of the embedding."""
    columns = [data for data, settings in DATA_SETS.items() if len(settings.sizes) > 1]
    figure = new_figure(10, 7)
    grid = figure.subplots(2, len(columns), squeeze=False)
    for column, data in enumerate(columns):
        for row, size in enumerate((SHOWN[0], SHOWN[-1])):
            axes = grid[row][column]
            for way, (_, _, color) in WAYS.items():
                for pooling, style in (("statistics", "-"), ("simple", ":")):
                    points = [line for line in found if (line.data, line.way, line.pooling) == (data, way, pooling)]
                    pairs, recalls = [line.pairs for line in points], [line.mean(size) for line in points]
                    label = f"{way}, {pooling}" if pooling == "statistics" else None
                    axes.plot(pairs, recalls, color=color, linestyle=style, marker="o", markersize=3.5, label=label)
            ticks = sorted({line.pairs for line in found if line.data == data})
            axes.set_xscale("log")
            axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            finish_axes(axes, f"{data}, {size} numbers", "training pairs", "R@1, mean of both ways (%)")
    grid[0][0].legend(fontsize=8, title="dotted: simple pooling", title_fontsize=8)
    save_figure(figure, PLOT)


if __name__ == "__main__":
    main()
