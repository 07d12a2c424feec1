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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import alternate, report
from training.index import SHORTLISTS, EdgeGlassIndex
from training.index_files import EMBEDDINGS, Batch, Item, unit_prefixes

ITEMS, SIZES, K = 100_000, (128, 512, 4096), 10
DECAY = 0.6  # the coordinate number i has a standard deviation of i to the power of -0.6
NOISE = 1.5  # length of the noise beside an item of length 1
BATCH, BLOCK = 5_000, 4_096  # rows written, and compared by the peer, at a time


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        index = EdgeGlassIndex.build(Path(folder) / "index", batches(rng), sizes=SIZES)
        embeddings = torch.from_numpy(np.load(index.folder / EMBEDDINGS, mmap_mode="c"))
        chosen = embeddings[torch.from_numpy(rng.choice(ITEMS, 32, replace=False))].numpy()
        queries = unit_prefixes(chosen + NOISE * vectors(rng, len(chosen)), SIZES[-1])
        expected, found = (
            look_at_all(embeddings, torch.from_numpy(queries)).numpy(),
            index.search(queries, K).positions,
        )
        overlap = float(np.mean([np.isin(row, right).mean() for row, right in zip(found, expected, strict=True)]))
        for number in (1, len(queries)):
            compare(index, embeddings, queries[:number], overlap)


def compare(index: EdgeGlassIndex, embeddings: Tensor, queries: np.ndarray, overlap: float) -> None:
    """Measure both ways with the same queries."""
    ours, peer = partial(index.search, queries, K), partial(look_at_all, embeddings, torch.from_numpy(queries))
    seconds = alternate({"ours": ours, "peer": peer})
    report(
        f"search/{len(queries)} at once, N={ITEMS}",
        ours=1e3 * seconds["ours"] / len(queries),
        peer=1e3 * seconds["peer"] / len(queries),
        unit="ms per query",
        peer_is="all embeddings in full, in blocks",
        ratio=seconds["peer"] / seconds["ours"],
        bound=">= 5",
        overlap=round(overlap, 4),
        sizes=SIZES,
        shortlists=SHORTLISTS,
        threads=torch.get_num_threads(),
    )


def look_at_all(embeddings: Tensor, queries: Tensor) -> Tensor:
    """The places (Q, K) of the most similar, block by block."""
    best, places = torch.full((len(queries), K), -2.0), torch.zeros(len(queries), K, dtype=torch.long)
    for start in range(0, len(embeddings), BLOCK):
        cosines, found = (queries @ embeddings[start : start + BLOCK].T).topk(K)
        best, order = torch.cat([best, cosines], dim=1).topk(K)
        places = torch.cat([places, found + start], dim=1).gather(1, order)
    return places


def batches(rng: np.random.Generator) -> Iterator[Batch]:
    for start in range(0, ITEMS, BATCH):
        yield vectors(rng, BATCH), [Item(f"{number}.png") for number in range(start, start + BATCH)]


def vectors(rng: np.random.Generator, number: int) -> np.ndarray:
    """Unit vectors (number, D)."""
    scale = np.arange(1, SIZES[-1] + 1, dtype=np.float32) ** -DECAY
    return unit_prefixes(rng.standard_normal((number, SIZES[-1]), dtype=np.float32) * scale, SIZES[-1])


if __name__ == "__main__":
    main()
