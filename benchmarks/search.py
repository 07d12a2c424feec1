"""Search in 100,000 embeddings of 4096 numbers: the funnel beside looking at all of them in full.

    python benchmarks/search.py

Synthetic unit vectors whose coordinates decay as those of a trained Matryoshka space do, in a temporary folder, mapped
into memory and read before anything is timed; queries are items with noise. The peer multiplies queries and embeddings
in blocks and keeps the ten best. Prints two JSON lines; `overlap` is the share of the peer's ten that ours finds.
"""

import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import alternate, report
from training.index import SHORTLISTS, EdgeGlassIndex
from training.index_files import EMBEDDINGS, Batch, Item, unit_prefixes

ITEMS, SIZES, K = 100_000, (128, 512, 4096), 10
SEARCHES = 10  # one after the other
DECAY = 0.6  # the coordinate number i has a standard deviation of i to the power of -0.6
NOISE = 1.5  # length of the noise beside an item of length 1
BATCH = 5_000  # rows written at a time


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        index = EdgeGlassIndex.build(Path(folder) / "index", batches(rng), sizes=SIZES)
        embeddings = np.load(index.folder / EMBEDDINGS, mmap_mode="r")
        chosen = embeddings[rng.choice(ITEMS, 32, replace=False)]
        queries = unit_prefixes(chosen + NOISE * vectors(rng, len(chosen)), SIZES[-1])
        expected, found = (index.search(queries, K, exact=exact).positions for exact in (True, False))
        overlap = float(np.mean([np.isin(row, right).mean() for row, right in zip(found, expected, strict=True)]))
        for number in (1, len(queries)):
            compare(index, queries[:number], overlap)


def compare(index: EdgeGlassIndex, queries: np.ndarray, overlap: float) -> None:
    """Measure both ways with the same queries, a row of searches each: the first ones wait for the other's threads."""

    def searches(exact: bool) -> None:
        for _ in range(SEARCHES):
            index.search(queries, K, exact=exact)

    seconds = alternate({"ours": partial(searches, False), "peer": partial(searches, True)})
    number = SEARCHES * len(queries)
    report(
        f"search/{len(queries)} at once, N={ITEMS}",
        ours=1e3 * seconds["ours"] / number,
        peer=1e3 * seconds["peer"] / number,
        unit="ms per query",
        peer_is="exact search at full size",
        ratio=seconds["peer"] / seconds["ours"],
        bound=">= 5" if len(queries) == 1 else ">= 3",  # many queries share one reading of the embeddings
        overlap=round(overlap, 4),
        sizes=SIZES,
        shortlists=SHORTLISTS,
        threads=torch.get_num_threads(),
    )


def batches(rng: np.random.Generator) -> Iterator[Batch]:
    for start in range(0, ITEMS, BATCH):
        yield vectors(rng, BATCH), [Item(f"{number}.png") for number in range(start, start + BATCH)]


def vectors(rng: np.random.Generator, number: int) -> np.ndarray:
    """Unit vectors (number, D)."""
    scale = np.arange(1, SIZES[-1] + 1, dtype=np.float32) ** -DECAY
    return unit_prefixes(rng.standard_normal((number, SIZES[-1]), dtype=np.float32) * scale, SIZES[-1])


if __name__ == "__main__":
    main()
