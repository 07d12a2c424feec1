"""Results as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from training.retrieval import RECALL_KS


def recall_table(metrics: Mapping[str, float], dimensions: Sequence[int], split: str = "val") -> str:
    """R@1/5/10 in percent, both ways, one row per size.

    Args:
        metrics: Under the logged names, such as `val/i2t_r1` and `val/i2t_r1@128`.
        dimensions: The full size first, then the Matryoshka sizes.
        split: What the names begin with.
    """
    header = "dimension | i2t R@1   R@5  R@10 | t2i R@1   R@5  R@10"
    lines = ["share of queries with a match among the first K, in percent", header, "-" * len(header)]
    for dimension in dimensions:
        suffix = "" if dimension == dimensions[0] else f"@{dimension}"
        cells = [
            " ".join(f"{100 * metrics[f'{split}/{way}_r{k}{suffix}']:5.1f}" for k in RECALL_KS)
            for way in ("i2t", "t2i")
        ]
        lines.append(f"{dimension:9d} |   {cells[0]} |   {cells[1]}")
    return "\n".join(lines)


def recall_rows(metrics: Mapping[str, float], full_dimension: int | None, split: str = "val") -> list[dict[str, Any]]:
    """Per size, the largest first: its name, R@K both ways in percent, and the kept share of the mean R@1.

    Args:
        metrics: Under the logged names.
        full_dimension: Numbers of the full embedding; None where it is not known.
        split: What the names begin with.
    """
    first = f"{split}/i2t_r1"
    if first not in metrics:
        return []
    sizes = sorted({int(name.partition("@")[2]) for name in metrics if name.startswith(f"{first}@")}, reverse=True)

    def mean_r1(suffix: str) -> float:
        return (metrics[f"{split}/i2t_r1{suffix}"] + metrics[f"{split}/t2i_r1{suffix}"]) / 2

    rows = []
    for size in (None, *sizes):
        suffix = "" if size is None else f"@{size}"
        recalls = [100 * metrics[f"{split}/{way}_r{k}{suffix}"] for way in ("i2t", "t2i") for k in RECALL_KS]
        kept = 100 * mean_r1(suffix) / mean_r1("") if mean_r1("") else None
        rows.append({"size": size or full_dimension or "full", "recalls": recalls, "kept": kept})
    return rows


def description_table(metrics: Mapping[str, float], dimensions: Sequence[int], split: str = "val") -> str:
    """Scores of descriptions, one row per size; then those without looking at the picture, where they were measured.

    Args:
        metrics: Under the logged names, such as `val/cider` and `val/cider@128`.
        dimensions: The full size first, then the Matryoshka sizes.
        split: What the names begin with.
    """
    header = ("", *DESCRIPTION_COLUMNS)
    rows = [header, *((name, *cells) for name, cells in description_rows(metrics, dimensions[0], split))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([DESCRIPTION_UNITS, lines[0], "-" * len(lines[0]), *lines[1:]])


DESCRIPTION_UNITS = "perplexity of a token; of the rest a hundredth each; CIDEr with its 95 % interval by bootstrap"
DESCRIPTION_COLUMNS = (
    "perplexity",
    "BLEU-4",
    "ROUGE-L",
    "CIDEr",
    "interval",
    "exact",
    *(f"self R@{k}" for k in RECALL_KS),
)
_SCORES = ("bleu4", "rouge_l", "cider", "exact_match", *(f"self_r{k}" for k in RECALL_KS))


def description_rows(
    metrics: Mapping[str, float], full_dimension: int | None, split: str = "val"
) -> list[tuple[str, list[str]]]:
    """Names and cells of the rows of a table of descriptions: sizes, the largest first, then the controls."""
    sizes = sorted(
        (int(name.partition("@")[2]) for name in metrics if name.startswith(f"{split}/perplexity@")), reverse=True
    )
    kinds = [(str(full_dimension or "full"), "", "")]
    kinds += [(str(size), "", f"@{size}") for size in sizes]
    kinds += [("another picture's", "other_", ""), ("untrained bridge", "untrained_", "")]
    rows = []
    for title, prefix, suffix in kinds:

        def cell(name: str, scale: float = 100, prefix: str = prefix, suffix: str = suffix) -> str:
            value = metrics.get(f"{split}/{prefix}{name}{suffix}")
            return "" if value is None else f"{scale * value:.1f}"

        scores = [cell(name) for name in _SCORES]
        interval = f"{cell('cider_low')}..{cell('cider_high')}" if cell("cider") else ""
        cells = [cell("perplexity", 1), *scores[:3], interval, *scores[3:]]
        if any(cells[:4]):
            rows.append((title, cells))
    return rows
