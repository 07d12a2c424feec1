"""EdgeGlassIndex: embeddings on disk that are searched exactly at any size, or through a funnel of sizes.

A funnel looks at all items with a short prefix, at the best of them with a longer one, and at the best of those with
the whole embedding: "Matryoshka Representation Learning" (arXiv:2205.13147, adaptive retrieval).

The first look is faiss', not usearch's: both scan prefixes of float16 exactly, and of 100,000 items faiss finds the
nearest 1,000 in 1.0 ms for a query that is alone and 1.3 ms in a batch, usearch in 4.7 and 2.1 ms. Neither one's graph
(HNSW) is used: it took 10 to 40 s to build, is another after each build, lost up to one of 100 true neighbours where
500 were asked for, and was no faster.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from training.errors import ConfigError, DataError, printable
from training.index_files import (
    EMBEDDINGS,
    ITEMS,
    PREFIXES,
    ROWS_PER_GROUP,
    Batch,
    Item,
    map_array,
    read_metadata,
    unit_prefixes,
    write_index,
)

# Items kept behind 128 and 512 numbers. On 10,085 icons these lose nothing of R@10; 500 at first lose 3 % of it.
SHORTLISTS = (1000, 50)

_NUMBERS_AT_ONCE = 1 << 24  # of embeddings, in the scan of an exact search: 64 MB of float32
_QUERIES_AT_ONCE = 64
# More than float32 errs in a cosine: what is within it of the k-th best is computed again in float64.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Found:
    """The k best items of each of Q queries, the best first; what is equally similar, in the order of the index.

    Args:
        scores: Cosines (Q, k), float32.
        positions: Places in the index (Q, k), from 0.
    """

    scores: np.ndarray
    positions: np.ndarray


class EdgeGlassIndex:
    """N embeddings in a folder, mapped into memory: opening reads metadata, searching the parts it needs.

    Args:
        folder: What `build` wrote.

    Attributes:
        sizes: Of the funnel, ascending; the last one is that of the embeddings, D.
        model: Name or path of the model that made the embeddings.
        weights: Checksum of its weights.

    Raises:
        DataError: There is no index, or a file of it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        metadata = read_metadata(self.folder)
        self.sizes, self.model, self.weights = metadata.sizes, metadata.model, metadata.weights
        self._count = metadata.count
        self._embeddings = map_array(self.folder / EMBEDDINGS, metadata.dtype, (metadata.count, self.sizes[-1]))
        self._prefixes = map_array(self.folder / PREFIXES, "float16", (metadata.count, self.sizes[0]))

    @classmethod
    def build(
        cls,
        folder: str | Path,
        batches: Iterable[Batch],
        *,
        sizes: Sequence[int],
        model: str = "",
        weights: str = "",
        dtype: str = "float32",
    ) -> "EdgeGlassIndex":
        """Write an index, whole or not at all; memory holds a batch and some thousand embeddings.

        Args:
            folder: Where; it must not be there yet. Until all is written it is called `folder.partial`.
            batches: Embeddings (B, D) of any length with B items each; their order is that of the index.
            sizes: Of the funnel, ascending; the last one is D.
            model: Name or path of the model that makes the embeddings.
            weights: Checksum of its weights.
            dtype: Of the embeddings on disk, float32 or float16.

        Raises:
            ConfigError: The folder exists, or sizes or dtype are impossible.
            DataError: There are no embeddings, or one of another size, NaN or infinite.
            OutputError: The disk is full, or the folder cannot be written.
        """
        write_index(Path(folder), batches, sizes=sizes, model=model, weights=weights, dtype=dtype)
        return cls(folder)

    def __len__(self) -> int:
        return self._count

    def items(self, positions: Iterable[int]) -> list[Item]:
        """What lies at places in the index, from 0.

        Raises:
            ConfigError: There is no such place.
            DataError: The file of the items is damaged.
        """
        places = [int(position) for position in positions]
        if wrong := [place for place in places if not 0 <= place < len(self)]:
            raise ConfigError(f"the index has places 0 to {len(self) - 1}, and not {wrong[0]}")
        try:
            with pyarrow.parquet.ParquetFile(self.folder / ITEMS) as file:
                return [_read_item(file, place) for place in places]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, TypeError, IndexError) as error:
            raise DataError(f"{self.folder / ITEMS}: is damaged: {printable(str(error), 200)}") from error

    def search(
        self,
        queries: Any,
        k: int = 10,
        *,
        truncate_dim: int | None = None,
        exact: bool = False,
        shortlists: Sequence[int] = SHORTLISTS,
    ) -> Found:
        """Find the k items whose embeddings are most similar to each query.

        Both sides are cut to `truncate_dim` numbers first, and then normalised. Scores are those of this size, however
        an item was found. At sizes below the funnel's first every search is exact.

        Args:
            queries: Embeddings (Q, D) of any length; arrays or tensors on the CPU.
            k: Items per query, 1 or more; there are no more than the index holds.
            truncate_dim: Numbers that are compared, 1..D; None compares all.
            exact: Look at all items at this size, instead of through the funnel.
            shortlists: Items kept behind each size of the funnel but the last, where up to ten are asked for; where
                more are, in proportion.

        Raises:
            ConfigError: An argument is impossible, or faiss is needed and not installed.
        """
        queries = self._checked(queries, k, truncate_dim)
        size = self.sizes[-1] if truncate_dim is None else truncate_dim
        k = min(k, len(self))
        first: Callable[[np.ndarray], Sequence[np.ndarray] | np.ndarray]
        if exact or size < self.sizes[0]:
            first, stages = partial(self._scan, k=k, size=size), [(size, k)]
        else:
            count, stages = self._stages(k, size, shortlists)
            first = partial(self._nearest_prefixes, count=count)
        scores, positions = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            part = queries[start : start + _QUERIES_AT_ONCE]
            for row, (query, candidates) in enumerate(zip(part, first(part), strict=True), start):
                positions[row], scores[row] = self._narrow(query, candidates, stages)
        return Found(scores, positions)

    def _checked(self, queries: Any, k: int, truncate_dim: int | None) -> np.ndarray:
        queries = np.asarray(queries, dtype=np.float32)
        D = self.sizes[-1]
        if queries.ndim != 2 or queries.shape[1] != D:
            raise ConfigError(f"queries must have the shape (Q, {D}) of the index, got {queries.shape}")
        if not np.isfinite(queries).all():
            raise ConfigError("a query is NaN or infinite")
        if k < 1:
            raise ConfigError(f"k must be 1 or more, got {k}")
        if truncate_dim is not None and not 0 < truncate_dim <= D:
            raise ConfigError(f"truncate_dim must be in 1..{D}, got {truncate_dim}")
        return queries

    def _scan(self, queries: np.ndarray, k: int, size: int) -> list[np.ndarray]:
        """For each query, in ascending order, all places that may be among the k best, for all that float32 knows."""
        queries = unit_prefixes(queries, size)
        best = np.full((len(queries), k), -np.inf, dtype=np.float32)
        rows_at_once = max(1, _NUMBERS_AT_ONCE // max(size, len(queries)))
        seen = []
        for start in range(0, len(self), rows_at_once):
            rows = np.asarray(self._embeddings[start : start + rows_at_once, :size], dtype=np.float32)
            cosines = (rows @ queries.T).T  # (Q, rows); the other way round is slow for few queries
            if not np.isfinite(cosines).all():
                raise DataError(f"{self.folder / EMBEDDINGS}: holds NaN or infinite numbers; build the index anew")
            if size < self.sizes[-1] or self._embeddings.dtype != np.float32:  # else they are of unit length
                cosines /= _lengths(rows)
            best = np.partition(np.concatenate([best, cosines], axis=1), -k, axis=1)[:, -k:]  # the k-th comes first
            lines, places = np.nonzero(cosines >= best[:, :1] - _ROUNDING)
            seen.append((lines, places + start, cosines[lines, places]))
        lines, places, cosines = (np.concatenate(column) for column in zip(*seen, strict=True))
        is_near = cosines >= best[lines, 0] - _ROUNDING
        return [places[is_near & (lines == line)] for line in range(len(queries))]

    def _stages(self, k: int, size: int, shortlists: Sequence[int]) -> tuple[int, list[tuple[int, int]]]:
        """How many items the first look keeps, and sizes and numbers of items of the looks behind it."""
        if len(shortlists) < max(1, len(self.sizes) - 1) or min(shortlists) < 1:
            raise ConfigError(f"shortlists must be lengths of 1 or more, one per size of {self.sizes} but the last")
        lengths = [min(len(self), max(k, length, length * k // 10)) for length in shortlists]
        between = zip(self.sizes[1:-1], lengths[1:], strict=False)
        return lengths[0], [*((stage, length) for stage, length in between if stage < size), (size, k)]

    def _narrow(
        self, query: np.ndarray, candidates: np.ndarray, stages: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray]:
        """What is left of the candidates behind all stages, and its cosines at the size of the last."""
        for size, length in stages[:-1]:
            candidates, _ = self._best(query, candidates, length, size, np.float32)
        size, k = stages[-1]
        return self._best(query, candidates, k, size)

    def _nearest_prefixes(self, queries: np.ndarray, count: int) -> np.ndarray:
        """Places (Q, count) of the items that are nearest at the funnel's first size."""
        scanner = self._scanner
        import faiss

        threads = faiss.omp_get_max_threads()
        # A query is one thread's work. Others that have none are waited for, ten times as long where cores are busy.
        faiss.omp_set_num_threads(min(threads, len(queries)))
        try:
            return scanner.search(unit_prefixes(queries, self.sizes[0]), count)[1]
        finally:
            faiss.omp_set_num_threads(threads)

    @cached_property
    def _scanner(self) -> Any:
        """The prefixes as faiss scans them; it takes a copy, of 26 MB for 100,000 items at 128."""
        try:
            import faiss
        except ImportError as error:
            raise ConfigError("the funnel needs faiss: pip install faiss-cpu, or search exactly (--exact)") from error
        scanner = faiss.IndexScalarQuantizer(self.sizes[0], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        scanner.add_sa_codes(self._prefixes.view(np.uint8))  # its codes are the bytes of float16
        return scanner

    def _best(
        self, query: np.ndarray, candidates: np.ndarray, k: int, size: int, dtype: type = np.float64
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k best candidates, of equal ones the first, with their cosines.

        Row by row, and not by BLAS: the same embedding has the same cosine wherever it lies.
        """
        candidates = np.sort(candidates)
        rows: np.ndarray = self._embeddings[candidates, :size].astype(dtype, copy=False)
        unit_query = query[:size] / _lengths(query[None, :size].astype(np.float64))  # in float64
        cosines = np.einsum("nd,d->n", rows, unit_query.astype(dtype)) / _lengths(rows)
        order = np.argsort(-cosines, kind="stable")[:k]
        if candidates[0] < 0 or not np.isfinite(cosines[order]).all():  # faiss says -1 where it finds no more numbers
            raise DataError(f"{self.folder}: holds NaN or infinite numbers; build the index anew")
        return candidates[order], cosines[order]


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.maximum(np.sqrt(np.einsum("nd,nd->n", rows, rows)), 1e-12)


def _read_item(file: pyarrow.parquet.ParquetFile, position: int) -> Item:
    group, row = divmod(position, ROWS_PER_GROUP)
    return Item(**file.read_row_group(group).slice(row, 1).to_pylist()[0])
