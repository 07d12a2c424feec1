"""Features on disk come back as they were, and damage is found."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import flip_a_bit
from training.errors import ConfigError
from training.feature_cache import Entry, FeatureCache

pytestmark = pytest.mark.usefixtures("small_files")


def entries(features: list[torch.Tensor | None]) -> list[Entry]:
    return [
        Entry(tokens, number, -number, "broken" if tokens is None else None)
        for number, tokens in enumerate(features, start=1)
    ]


def random_features(lengths: list[int], width: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, width, generator=generator) * 10 for length in lengths]


def new_cache(folder: Path, dtype: str = "float16", num_entries: int = 19, **origin: Any) -> FeatureCache:
    return FeatureCache(folder, "text", origin, num_entries, dtype)


def filled_cache(folder: Path, dtype: str = "float16") -> tuple[FeatureCache, list[torch.Tensor | None]]:
    cache = new_cache(folder, dtype)
    features: list[torch.Tensor | None] = [*random_features([1 + i % 5 for i in range(19)])]
    features[3] = features[8] = None
    for shard in cache.shards:
        cache.write(shard, [entries(features)[i] for i in cache.entries_of(shard)])
    return cache, features


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_an_entry_comes_back_to_the_stored_precision(dtype: str, tmp_path: Path):
    cache, features = filled_cache(tmp_path, dtype)
    for number, tokens in enumerate(features):
        kept = cache[number]
        assert (kept.content_id, kept.token_hash) == (number + 1, -number - 1)
        if tokens is None:
            assert (kept.features, kept.defect) == (None, "broken")
        elif dtype == "int8":  # half a step of the token's scale
            step = tokens.abs().amax(dim=1, keepdim=True) / 127
            assert ((kept.features - tokens).abs() <= step * 0.5001).all()
        else:
            assert torch.equal(kept.features, tokens.to(getattr(torch, dtype)))


def test_int8_keeps_tokens_of_zeros_and_of_tiny_numbers(tmp_path: Path):
    cache = new_cache(tmp_path, "int8", 1)
    tokens = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [127.0, 1.0]])
    cache.write(0, [Entry(tokens)])
    torch.testing.assert_close(cache[0].features, tokens)


def test_what_float16_cannot_hold_is_an_error_that_names_bfloat16(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"values up to 1e\+05, too large .*float16: set bfloat16"):
        new_cache(tmp_path, num_entries=1).write(0, [Entry(torch.full((2, 4), 1e5))])
    new_cache(tmp_path, "bfloat16", num_entries=1).write(0, [Entry(torch.full((2, 4), 1e5))])


DAMAGES = {
    "flipped bit": flip_a_bit,
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "empty": lambda path: path.write_bytes(b""),
    "not there": Path.unlink,
    "no mark": lambda path: path.with_suffix(".json").unlink(),
    "half a mark": lambda path: path.with_suffix(".json").write_text('{"checksum": "'),
    "a list for a mark": lambda path: path.with_suffix(".json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_counts_as_missing_and_can_be_written_again(damage, tmp_path: Path):
    cache, features = filled_cache(tmp_path)
    assert new_cache(tmp_path).missing_shards() == []
    damage(cache.folder / "000001.safetensors")
    again = new_cache(tmp_path)
    assert again.missing_shards() == [1]
    again.write(1, [entries(features)[i] for i in again.entries_of(1)])
    assert new_cache(tmp_path).missing_shards() == []
    assert torch.equal(again[9].features, features[9].half())


def test_a_copied_cache_is_read_once_more_and_holds(tmp_path: Path):
    cache, _ = filled_cache(tmp_path / "a")
    shutil.copytree(cache.folder, tmp_path / "b" / cache.folder.name, copy_function=shutil.copyfile)
    copied = new_cache(tmp_path / "b")
    before = (copied.folder / "000000.json").read_text()
    assert copied.missing_shards() == []
    assert (copied.folder / "000000.json").read_text() != before  # the new time stands there now
    assert torch.equal(copied[0].features, cache[0].features)


def test_a_cache_is_of_its_origin_size_and_type(tmp_path: Path):
    folders = {
        new_cache(tmp_path).folder,
        new_cache(tmp_path, weights=1).folder,
        new_cache(tmp_path, weights=2).folder,
        new_cache(tmp_path, num_entries=20).folder,
        new_cache(tmp_path, "int8").folder,
    }
    assert len(folders) == 5
    assert new_cache(tmp_path, weights=1).folder in folders


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_pooled_features_are_vectors_and_what_is_bad_stays_bad(dtype: str, tmp_path: Path):
    cache = FeatureCache(tmp_path, "vision", {}, 5, dtype, is_pooled=True)
    vectors = [features[0] for features in random_features([1] * 5)]
    kept = entries([*vectors[:2], None, *vectors[3:]])
    cache.write(0, kept)
    assert cache.missing_shards() == []
    for place, vector in enumerate(vectors):
        found = cache[place]
        if place == 2:
            assert (found.features, found.defect) == (None, "broken")
        else:
            assert found.features is not None
            torch.testing.assert_close(found.features.float(), vector, rtol=1e-2, atol=0.2)
    assert cache.blank().shape == (16,)
