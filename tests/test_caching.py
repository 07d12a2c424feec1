"""Features of frozen towers that are kept: the same training, once computed, checked, and repaired."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

import training.feature_cache
from run_alignment import align
from tests.conftest import flip_a_bit, write_pairs
from tests.interruptions import AtStep, Killed, assert_equal_bits, kill, what_is_left
from tests.runs import make_trainer
from training.caching import cache_features
from training.checkpoints import newest_checkpoint
from training.config import load_config
from training.errors import ConfigError
from training.feature_cache import FeatureCache
from training.signals import Interrupted, SignalListener
from training.visualization import sample_evaluation

CACHED = "dataset.cache=disk"
pytestmark = pytest.mark.usefixtures("small_files")


@pytest.fixture
def cache_dir(run_config: Path) -> str:
    return f"dataset.cache_dir={run_config.parent}/cache"


def logged(trainer: Any) -> dict[str, list[float]]:
    names = ("loss", "loss_clip", "loss_mrl", "eval_loss", "eval_i2t_r1", "eval_t2i_medr")
    return {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 2e-2), ("int8", 5e-2)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("pooling", ["true", "false"])
def test_losses_are_those_of_an_uncached_run(
    dtype: str, tolerance: float, pooling: str, run_config: Path, cache_dir: str
):
    options = ["dataset.text_dropout_prob=0.4", f"vision_encoder.use_attention_pooling={pooling}"]
    options += [f"text_encoder.use_attention_pooling={pooling}", "optimization.lr=1e-3"]
    uncached = make_trainer(run_config, *options)
    uncached.train_dataset.image_transforms = uncached.eval_dataset.image_transforms
    uncached.train()
    cached = make_trainer(run_config, *options, CACHED, cache_dir, f"dataset.cache_dtype={dtype}",
                          f"trainer.output_dir={run_config.parent}/cached")  # fmt: skip
    cached.train()
    expected, found = logged(uncached), logged(cached)
    assert len(expected["loss"]) == 10
    for name, values in expected.items():
        if "_r1" not in name and "medr" not in name:
            torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(values), rtol=tolerance, atol=tolerance)
    if dtype == "float16":
        assert found["eval_i2t_r1"] == expected["eval_i2t_r1"]


def test_no_tower_runs_once_everything_is_kept(run_config: Path, cache_dir: str, monkeypatch):
    make_trainer(run_config, CACHED, cache_dir).train()
    monkeypatch.setattr("modeling_edgeglass.encoders._Encoder._run_backbone", None)
    again = make_trainer(run_config, CACHED, cache_dir, f"trainer.output_dir={run_config.parent}/again")
    again.train()
    assert again.state.global_step == 10


def test_a_tower_that_trains_runs_beside_the_features_of_the_other(run_config: Path, cache_dir: str):
    for side, other in (("vision", "text"), ("text", "vision")):
        trainer = make_trainer(run_config, CACHED, cache_dir, f"{side}_encoder.freeze=false", "trainer.max_steps=1",
                               f"trainer.output_dir={run_config.parent}/{side}")  # fmt: skip
        item = trainer.train_dataset[0]
        assert ("image" in item, "text" in item) == (side == "vision", side == "text")
        assert f"{'image' if other == 'vision' else 'text'}_features" in item
        trainer.train()
        assert trainer.state.log_history


def folders(cache_dir: str) -> dict[str, set[str]]:
    found = Path(cache_dir.partition("=")[2]).iterdir()
    names = [folder.name for folder in found]
    return {side: {name for name in names if name.startswith(side)} for side in ("vision", "text")}


def test_anything_that_changes_the_features_makes_a_new_cache(
    run_config: Path, cache_dir: str, vision_dir: str, tmp_path: Path
):
    shutil.copytree(vision_dir, tmp_path / "tower")
    weights = safetensors_of(tmp_path / "tower")
    options = (CACHED, cache_dir, f"vision_encoder.model_name={tmp_path}/tower")
    make_trainer(run_config, *options)
    before = folders(cache_dir)
    assert {side: len(names) for side, names in before.items()} == {"vision": 2, "text": 2}  # train and val

    def new_folders(*overrides: str) -> dict[str, int]:
        known = folders(cache_dir)
        make_trainer(run_config, *options, *overrides)
        return {side: len(names - known[side]) for side, names in folders(cache_dir).items()}

    assert new_folders() == {"vision": 0, "text": 0}
    assert new_folders("optimization.lr=1", "dataset.text_dropout_prob=0.5") == {"vision": 0, "text": 0}
    assert new_folders("vision_encoder.feature_layers=[-1,-2]") == {"vision": 2, "text": 0}
    assert new_folders("text_encoder.feature_layers=[-1,-2]") == {"vision": 0, "text": 2}
    assert new_folders("dataset.image_size=48") == {"vision": 2, "text": 0}
    assert new_folders("dataset.cache_views=2") == {"vision": 1, "text": 0}
    assert new_folders("dataset.cache_views=2", "trainer.seed=7") == {"vision": 1, "text": 0}
    assert new_folders("dataset.max_text_length=9") == {"vision": 0, "text": 2}
    assert new_folders("dataset.cache_dtype=int8") == {"vision": 2, "text": 2}
    assert new_folders("dataset.caption_column=sample_id") == {"vision": 0, "text": 2}
    name, value = next((name, value) for name, value in weights.items() if name.endswith("weight"))
    safetensors_of(tmp_path / "tower", {**weights, name: value + 1e-3})
    assert new_folders() == {"vision": 2, "text": 0}
    write_pairs(tmp_path / "train.parquet", 20, first=1)
    assert new_folders() == {"vision": 1, "text": 1}


def test_how_a_tokenizer_was_last_called_makes_no_new_cache(run_config: Path, cache_dir: str):
    trainer = make_trainer(run_config, CACHED, cache_dir)
    before = folders(cache_dir)
    processor = trainer.processing_class
    processor.tokenizer(["a"], padding="max_length", max_length=7, truncation=True)  # a notebook that looks at lengths
    data = {"train": trainer.train_dataset, "val": trainer.eval_dataset}
    cache_features(load_config(run_config, [CACHED, cache_dir]).dataset, trainer.model, trainer, processor, data)
    assert folders(cache_dir) == before


def safetensors_of(folder: Path, new: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file, save_file

    if new is not None:
        save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    return load_file(folder / "model.safetensors")


def test_one_of_the_kept_views_is_drawn_by_seed_epoch_and_index(run_config: Path, cache_dir: str):
    trainer = make_trainer(run_config, CACHED, cache_dir, "dataset.cache_views=3", "dataset.cache_dtype=bfloat16")
    dataset, encoder = trainer.train_dataset, trainer.model.vision_encoder
    row = dataset.pairs[5]
    with torch.no_grad():
        views = [encoder.features(dataset.pixels(row, dataset.view_rng(v, 5)).unsqueeze(0))[0] for v in range(3)]
    assert not torch.allclose(views[0], views[1], atol=1e-2)

    def view_of(epoch: int) -> int:
        kept = dataset[epoch, 5]["image_features"].float()
        return min(range(3), key=lambda v: float((kept - views[v]).abs().max()))

    drawn = [view_of(epoch) for epoch in range(30)]
    assert drawn == [view_of(epoch) for epoch in range(30)]
    assert {drawn.count(view) > 3 for view in range(3)} == {True}
    for view in range(3):
        kept = dataset[drawn.index(view), 5]["image_features"].float()
        torch.testing.assert_close(kept, views[view], rtol=1e-2, atol=1e-2)
    assert trainer.eval_dataset.views == 1


def test_bad_rows_are_known_from_the_cache_and_replaced_by_the_same_rows(run_config: Path, cache_dir: str):
    for split in ("train", "val"):
        path = run_config.parent / f"{split}.parquet"
        columns = pyarrow.parquet.read_table(path).to_pydict()
        columns["image_bytes"][2], columns["image_bytes"][4] = b"broken", None
        columns["caption"][6] = " "
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    uncached = make_trainer(run_config, "dataset.max_bad_fraction=1")
    cached = make_trainer(run_config, CACHED, cache_dir, "dataset.max_bad_fraction=1")
    for epoch in range(3):
        for index in range(20):
            plain, kept = uncached.train_dataset[epoch, index], cached.train_dataset[epoch, index]
            assert plain["sample_id"] == kept["sample_id"]
            assert plain["bad_samples"] == kept["bad_samples"]
            assert bool(plain["bad_samples"]) == (index in (2, 4, 6))
    for index in range(10):
        plain, kept = uncached.eval_dataset[index], cached.eval_dataset[index]
        for key in ("is_valid", "image_id", "caption_id", "bad_samples", "sample_id"):
            assert plain[key] == kept[key], key
    before, after = uncached.evaluate(), cached.evaluate()
    assert before["eval_bad_rows"] == after["eval_bad_rows"] == 3
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-3)


def test_figures_show_the_same_pictures_and_weights(run_config: Path, cache_dir: str):
    samples = []
    for options in ((), (CACHED, cache_dir)):
        trainer = make_trainer(run_config, *options)
        trainer.evaluate()
        samples.append(sample_evaluation(trainer.encoded, {}, trainer.model, step=0, seed=0))
    uncached, cached = samples
    assert torch.equal(cached.attended, uncached.attended)
    assert torch.equal(cached.attention, uncached.attention)
    assert torch.equal(cached.pictures, uncached.pictures)
    assert cached.captions == uncached.captions


def test_a_damaged_cache_is_repaired_to_the_same_bits_and_nothing_else_is_touched(run_config: Path, cache_dir: str):
    dataset = make_trainer(run_config, CACHED, cache_dir).train_dataset
    before = [dataset[i]["image_features"].clone() for i in range(20)]  # not views of the file
    folder = dataset.image_cache.folder
    assert sorted(path.name for path in folder.glob("*.safetensors")) == [f"{i:06d}.safetensors" for i in range(3)]
    flip_a_bit(folder / "000001.safetensors")
    times = {path: path.stat().st_mtime_ns for path in folder.parent.glob("*/*.safetensors")}
    dataset = make_trainer(run_config, CACHED, cache_dir).train_dataset
    assert [path.name for path, time in times.items() if path.stat().st_mtime_ns != time] == ["000001.safetensors"]
    for i in range(20):
        assert torch.equal(dataset[i]["image_features"], before[i])


def test_an_interrupted_pass_goes_on_where_it_stopped(run_config: Path, cache_dir: str, monkeypatch):
    class StopsAfterOneFile:
        asked = 0

        @property
        def received(self) -> bool:
            written = list(run_config.parent.glob("cache/vision-*/*.json"))
            return any(path.name == "000000.json" for path in written)

    written: list[tuple[str, int]] = []
    write = FeatureCache.write

    def noting(self: FeatureCache, shard: int, kept: Any) -> None:
        written.append((self.name, shard))
        write(self, shard, kept)

    monkeypatch.setattr(FeatureCache, "write", noting)
    monkeypatch.setattr("training.caching.SignalListener", StopsAfterOneFile)
    with pytest.raises(Interrupted):
        make_trainer(run_config, CACHED, cache_dir)
    assert written == [("vision", 0)]
    monkeypatch.undo()
    monkeypatch.setattr(training.feature_cache, "ENTRIES_PER_SHARD", 8)
    monkeypatch.setattr(FeatureCache, "write", noting)
    make_trainer(run_config, CACHED, cache_dir)
    train, val = [0, 1, 2], [0, 1]
    expected = [("vision", shard) for shard in (*train, *val)] + [("text", shard) for shard in (*train, *val)]
    assert sorted(written) == sorted(expected)  # every one once, over both sessions


def test_a_signal_in_the_pass_ends_the_run_as_one_in_training_does(run_config: Path, cache_dir: str):
    signals = SignalListener()
    signals.received = True
    assert align(load_config(run_config, [CACHED, cache_dir]), signals) == 75
    assert (run_config.parent / "run" / "preempted.json").exists()


def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(run_config: Path, cache_dir: str):
    options = [CACHED, cache_dir, "dataset.cache_views=2", "dataset.text_dropout_prob=0.3", "trainer.epochs=3"]
    whole = make_trainer(run_config, *options)
    whole.train()
    options.append(f"trainer.output_dir={run_config.parent}/cut")
    cut = make_trainer(run_config, *options)
    cut.add_callback(AtStep(8, kill))
    with pytest.raises(Killed):
        cut.train()
    shutil.rmtree(run_config.parent / "cache")  # lost with the node: it is made again, to the same bits
    cut = make_trainer(run_config, *options)
    cut.train(resume_from_checkpoint=newest_checkpoint(run_config.parent / "cut"))
    assert_equal_bits(what_is_left(whole), what_is_left(cut))


def test_a_disk_without_room_is_an_error_before_anything_is_written(run_config: Path, cache_dir: str, monkeypatch):
    usage = namedtuple("usage", ("total", "used", "free"))
    monkeypatch.setattr("training.caching.shutil.disk_usage", lambda path: usage(10, 0, 10))
    with pytest.raises(ConfigError, match=r"the features need about 0\.00 GB, and .* has 0\.00 GB free: name another"):
        make_trainer(run_config, CACHED, cache_dir)
    assert not list(run_config.parent.glob("cache/*/*"))


def test_the_size_is_told_before_it_is_written(run_config: Path, cache_dir: str, capsys):
    make_trainer(run_config, CACHED, cache_dir)
    told = capsys.readouterr().out
    assert "features of 20 train pictures: about 0.00 GB in" in told
    assert "features of 11 val captions" in told  # the empty one among them


def test_nothing_can_be_kept_where_both_towers_train(run_config: Path, cache_dir: str):
    both = ("vision_encoder.freeze=false", "text_encoder.freeze=false")
    with pytest.raises(ConfigError, match=r"dataset\.cache: both towers train"):
        make_trainer(run_config, CACHED, cache_dir, *both)


def test_two_ranks_write_the_files_of_one(run_config: Path):
    make_trainer(run_config, CACHED, f"dataset.cache_dir={run_config.parent}/one")
    program = (
        "import sys, training.feature_cache as files; files.ENTRIES_PER_SHARD = 8\n"
        "from tests.runs import make_trainer\nfrom training.run import leave\n"
        "trainer = make_trainer(sys.argv[1], *sys.argv[2:])\ntrainer.train()\nleave(trainer)\n"
    )
    script = run_config.parent / "two.py"
    script.write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(run_config)]
    root = str(Path(__file__).parents[1])
    subprocess.run(
        [*command, CACHED, f"dataset.cache_dir={run_config.parent}/two", "trainer.max_steps=2"],
        check=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        timeout=120,
    )
    one, two = (
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))}
        for folder in (run_config.parent / "one", run_config.parent / "two")
    )
    assert len(one) == 10
    assert one == two
    history = json.loads((run_config.parent / "run" / "training_history.json").read_text())
    assert history
