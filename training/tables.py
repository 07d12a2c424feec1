"""Results as text."""

from collections.abc import Mapping, Sequence

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
