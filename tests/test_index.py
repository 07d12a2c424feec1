"""An index finds what a naive search finds, comes back as it was built, and is whole or not there."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import training.index
import training.index_files
from tests.conftest import flip_a_bit
from training.errors import ConfigError, DataError, OutputError
from training.index import EdgeGlassIndex
from training.index_files import Batch, Item

SIZES = (8, 16, 64)


def vectors(number: int, dim: int = 64, seed: int = 0) -> np.ndarray:
    """Whose first coordinates tell most, as those of a Matryoshka space."""
    scale = np.arange(1, dim + 1) ** -0.7
    return (np.random.default_rng(seed).standard_normal((number, dim)) * scale).astype(np.float32)


def items(number: int, first: int = 0) -> list[Item]:
    return [Item(f"{i}.png") for i in range(first, first + number)]


def batches(embeds: np.ndarray, size: int = 7) -> Iterator[Batch]:
    for start in range(0, len(embeds), size):
        part = embeds[start : start + size]
        yield part, items(len(part), start)


def build(path: Path, embeds: np.ndarray, sizes: Sequence[int] = SIZES, **options) -> EdgeGlassIndex:
    return EdgeGlassIndex.build(path / "index", batches(embeds), sizes=sizes, **options)


def naive(index: EdgeGlassIndex, queries: np.ndarray, k: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of what is stored, cut first and then normalised, one pair at a time in double precision."""
    stored = np.load(index.folder / "embeddings.npy")[:, :size].astype(np.float64)
    positions, scores = [], []
    for query in queries[:, :size].astype(np.float64):
        cosines = [float(np.sum(query * row)) / np.linalg.norm(query) / np.linalg.norm(row) for row in stored]
        order = sorted(range(len(stored)), key=lambda i: (-cosines[i], i))[:k]
        positions.append(order)
        scores.append([cosines[i] for i in order])
    return np.array(positions), np.array(scores)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("size", [1, 5, 8, 40, 64])
def test_an_exact_search_finds_what_the_naive_one_finds_at_every_size(dtype, size, tmp_path, monkeypatch):
    monkeypatch.setattr(training.index, "_NUMBERS_AT_ONCE", 640)
    monkeypatch.setattr(training.index, "_QUERIES_AT_ONCE", 4)
    index, queries = build(tmp_path, vectors(300), dtype=dtype), vectors(9, seed=1)
    found = index.search(queries, 10, truncate_dim=size, exact=True)
    positions, scores = naive(index, queries, 10, size)
    if size > 1:  # at 1 all cosines are 1 or -1, but for their rounding
        assert np.array_equal(found.positions, positions)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_an_exact_search_ranks_what_float32_cannot_tell_apart(tmp_path: Path):
    embeds = vectors(1) + 1e-7 * vectors(300, seed=2)
    index, queries = build(tmp_path, embeds), vectors(9, seed=1)
    found = index.search(queries, 10, exact=True)
    assert np.array_equal(found.positions, naive(index, queries, 10, 64)[0])
    assert np.ptp(found.scores, axis=1).max() < 1e-6


@pytest.mark.parametrize("size", [8, 12, 16, 40, 64])
@pytest.mark.parametrize("sizes", [SIZES, (8, 64), (64,)])
def test_a_funnel_that_keeps_everything_is_an_exact_search(size: int, sizes: Sequence[int], tmp_path: Path):
    index, queries = build(tmp_path, vectors(300), sizes), vectors(9, seed=1)
    exact = index.search(queries, 10, truncate_dim=size, exact=True)
    funnel = index.search(queries, 10, truncate_dim=size, shortlists=(300, 300))
    assert np.array_equal(funnel.positions, exact.positions)
    assert np.array_equal(funnel.scores, exact.scores)


@pytest.mark.parametrize(("k", "lengths"), [(5, (12, 7)), (10, (12, 10)), (20, (24, 20)), (40, (48, 40))])
def test_a_funnel_keeps_the_best_of_each_size_and_for_more_items_in_proportion(k: int, lengths: tuple, tmp_path: Path):
    index, queries = build(tmp_path, vectors(300)), vectors(9, seed=1)
    found = index.search(queries, k, shortlists=(12, 7))
    stored = np.load(index.folder / "embeddings.npy")
    for row, query in enumerate(queries):
        kept = np.arange(300)
        for size, length in zip(SIZES, (*lengths, k), strict=True):
            cosines = stored[kept, :size] @ query[:size] / np.linalg.norm(stored[kept, :size], axis=1)
            kept = kept[np.argsort(-cosines)[:length]]
        assert kept.tolist() == found.positions[row].tolist()
    assert (found.positions != index.search(queries, k, exact=True).positions).any()  # it is narrow


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_equally_similar_comes_in_the_order_of_the_index(exact: bool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(training.index, "_NUMBERS_AT_ONCE", 64 * 37)
    embeds = np.repeat(vectors(5), 40, axis=0)[np.random.default_rng(2).permutation(200)]
    index = build(tmp_path, embeds)
    found = index.search(embeds[:3], 60, exact=exact)
    for row in range(3):
        same = np.flatnonzero((embeds == embeds[row]).all(axis=1))
        assert found.positions[row, :40].tolist() == same.tolist()
        assert len(set(found.scores[row, :40].tolist())) == 1
        assert sorted(set(found.positions[row].tolist())) == sorted(found.positions[row].tolist())


@pytest.mark.parametrize("exact", [True, False])
def test_neither_the_order_of_items_nor_other_queries_nor_lengths_change_what_is_found(exact: bool, tmp_path: Path):
    embeds, queries, order = vectors(300), vectors(9, seed=1), np.random.default_rng(3).permutation(300)
    one, other = build(tmp_path / "one", embeds), build(tmp_path / "other", 5 * embeds[order])
    found, again = one.search(queries, 10, exact=exact), other.search(1e25 * queries, 10, exact=exact)
    assert np.array_equal(order[again.positions], found.positions)
    alone = [one.search(queries[i : i + 1], 10, exact=exact) for i in range(9)]
    assert np.array_equal(np.concatenate([single.positions for single in alone]), found.positions)
    assert np.array_equal(np.concatenate([single.scores for single in alone]), found.scores)


def test_an_item_finds_itself_with_a_cosine_of_one(tmp_path: Path):
    index = build(tmp_path, vectors(50))
    for size in (3, 8, 20, 64):
        found = index.search(vectors(50), 1, truncate_dim=size)
        assert found.positions[:, 0].tolist() == list(range(50))
        np.testing.assert_allclose(found.scores, 1, atol=1e-6)


def test_more_than_there_are_finds_all_and_nobody_asked_finds_nothing(tmp_path: Path):
    index = build(tmp_path, vectors(5))
    for exact in (True, False):
        assert sorted(index.search(vectors(1, seed=1), 10, exact=exact).positions[0].tolist()) == list(range(5))
        assert index.search(vectors(0), 3, exact=exact).positions.shape == (0, 3)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_batches_change_no_bit_of_the_files(batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training.index_files, "ROWS_PER_GROUP", 16)
    whole = build(tmp_path, vectors(50), model="a model")
    again = EdgeGlassIndex.build(tmp_path / "again", batches(vectors(50), batch_size), sizes=SIZES, model="a model")
    for path in sorted(whole.folder.iterdir()):
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name


def test_an_index_comes_back_as_it_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (training.index, training.index_files):
        monkeypatch.setattr(module, "ROWS_PER_GROUP", 8)
    named = [Item(f"ä{i}.png") if i % 2 else Item("a.parquet", i, f"id\n{i}") for i in range(30)]
    EdgeGlassIndex.build(tmp_path / "index", [(vectors(30), named)], sizes=SIZES, model="m", weights="w")
    (tmp_path / "index").rename(tmp_path / "moved")
    index = EdgeGlassIndex(tmp_path / "moved")
    assert (len(index), index.sizes, index.model, index.weights) == (30, SIZES, "m", "w")
    assert index.items(range(30)) == named
    assert index.items([29, 0, 8]) == [named[29], named[0], named[8]]
    unit = vectors(30) / np.linalg.norm(vectors(30), axis=1, keepdims=True)
    np.testing.assert_allclose(np.load(index.folder / "embeddings.npy"), unit, atol=1e-7)
    assert not index._embeddings.flags.owndata  # mapped, not read
    assert not index._prefixes.flags.owndata


def test_a_build_that_fails_leaves_nothing_and_the_next_one_is_not_in_its_way(tmp_path: Path):
    def broken() -> Iterator[Batch]:
        yield vectors(5), items(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EdgeGlassIndex.build(tmp_path / "index", broken(), sizes=SIZES)
    assert list(tmp_path.iterdir()) == []
    partial = tmp_path / "index.partial"  # of one that was killed
    partial.mkdir()
    (partial / "embeddings.npy").write_bytes(b"x" * 10_000_000)
    with pytest.raises(DataError, match=r"no index, which has a file index\.json"):
        EdgeGlassIndex(partial)
    index = build(tmp_path, vectors(5))
    assert index.search(vectors(1), 1).positions.tolist() == [[0]]
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.index_files, "sync", full)
    with pytest.raises(OutputError, match=r"index could not be written to .*No space left.*make room"):
        build(tmp_path, vectors(5))
    assert list(tmp_path.iterdir()) == []


NAN, SHORT = np.full((3, 64), np.nan), np.ones((3, 63))


@pytest.mark.parametrize(
    ("embeds", "options", "message"),
    [
        (np.empty((0, 64)), {}, "nothing to search: not one embedding came"),
        (NAN, {}, r"0\.png: its embedding is NaN or infinite"),
        (SHORT, {}, r"3 items came with embeddings \(3, 63\), where \(3, 64\) belong"),
        (vectors(3), {"sizes": (16, 8, 64)}, r"whole numbers that grow, got \(16, 8, 64\)"),
        (vectors(3), {"sizes": ()}, r"whole numbers that grow, got \(\)"),
        (vectors(3), {"dtype": "float64"}, "dtype must be one of float32, float16, got float64"),
    ],
)
def test_what_cannot_be_an_index_is_none(embeds: np.ndarray, options: dict, message: str, tmp_path: Path):
    with pytest.raises((ConfigError, DataError), match=message):
        build(tmp_path, embeds, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_written_over(tmp_path: Path):
    (tmp_path / "index").mkdir()
    with pytest.raises(ConfigError, match="is there already; remove it, or name another folder"):
        build(tmp_path, vectors(5))
    assert list((tmp_path / "index").iterdir()) == []


@pytest.mark.parametrize(
    ("queries", "options", "message"),
    [
        (vectors(2, 63), {}, r"queries must have the shape \(Q, 64\) of the index, got \(2, 63\)"),
        (vectors(2)[0], {}, r"must have the shape \(Q, 64\) of the index, got \(64,\)"),
        (NAN, {}, "a query is NaN or infinite"),
        (vectors(2), {"k": 0}, "k must be 1 or more, got 0"),
        (vectors(2), {"truncate_dim": 0}, r"truncate_dim must be in 1\.\.64, got 0"),
        (vectors(2), {"truncate_dim": 65}, r"truncate_dim must be in 1\.\.64, got 65"),
        (vectors(2), {"shortlists": (5,)}, r"lengths of 1 or more, one per size of \(8, 16, 64\) but the last"),
        (vectors(2), {"shortlists": (5, 0)}, "lengths of 1 or more"),
    ],
)
def test_an_impossible_search_is_refused(queries: np.ndarray, options: dict, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, vectors(5)).search(queries, **options)


def test_without_faiss_only_the_funnel_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = build(tmp_path, vectors(5))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install faiss-cpu, or search exactly"):
        index.search(vectors(1))
    assert index.search(vectors(1), 1, exact=True).positions.tolist() == [[0]]
    assert index.search(vectors(1), 1, truncate_dim=4).positions.tolist() == [[0]]  # smaller than the funnel's first


def change(**values) -> object:
    def edit(folder: Path) -> None:
        stored = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(stored | values))

    return edit


def pickled(folder: Path) -> None:
    np.save(folder / "embeddings.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)


DAMAGES = {
    "no metadata": (lambda folder: (folder / "index.json").unlink(), "no index, which has a file"),
    "half": (lambda folder: (folder / "index.json").write_text('{"format'), r"index\.json: cannot be read"),
    "a list": (lambda folder: (folder / "index.json").write_text("[]"), "is not of format 1; build the index anew"),
    "another format": (change(format=2), "is not of format 1"),
    "no count": (change(count=0), r"index\.json: is damaged"),
    "sizes that shrink": (change(sizes=[64, 8]), r"index\.json: is damaged: sizes of a funnel"),
    "sizes that are none": (change(sizes=3), r"index\.json: is damaged"),
    "an unknown key": (change(path="/etc/passwd"), r"index\.json: is damaged"),
    "another count": (
        change(count=6),
        r"embeddings\.npy: holds float32 \(5, 64\), where index\.json says .* \(6, 64\)",
    ),
    "another dtype": (change(dtype="float16"), r"embeddings\.npy: holds float32"),
    "a pickle": (pickled, r"embeddings\.npy: cannot be read"),
    "cut off": (
        lambda folder: (folder / "prefixes.npy").write_bytes((folder / "prefixes.npy").read_bytes()[:-5]),
        r"prefixes\.npy: cannot be read: .*; build the index anew",
    ),
    "not there": (lambda folder: (folder / "prefixes.npy").unlink(), r"prefixes\.npy: cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_index_is_one_line(kind: str, tmp_path: Path):
    damage, message = DAMAGES[kind]
    folder = build(tmp_path, vectors(5)).folder
    damage(folder)
    with pytest.raises(DataError, match=message):
        EdgeGlassIndex(folder)


def test_damaged_items_are_one_line(tmp_path: Path):
    index = build(tmp_path, vectors(5))
    flip_a_bit(index.folder / "items.parquet")  # in the magic at its end
    with pytest.raises(DataError, match=r"items\.parquet: is damaged"):
        index.items([0])
