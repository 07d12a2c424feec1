"""The closed form as the start of training."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch import Tensor

from run_alignment import align
from tests.conftest import picture, write_pairs
from tests.interruptions import AtStep, Killed, assert_equal_bits, kill, what_is_left
from tests.runs import make_trainer
from tests.test_spectral import naive_embeds
from training.build import load_model
from training.checkpoints import newest_checkpoint
from training.config import load_config
from training.errors import ConfigError, DataError
from training.initialization import _Pass
from training.signals import SignalListener
from training.trainer import AlignmentTrainer

SPECTRAL = "optimization.init=spectral"
GIVEN = [SPECTRAL, "optimization.spectral_ridge=[0.3,1.0]", "optimization.spectral_power=1.5"]
STATISTICS = ["vision_encoder.pooling_type=statistics", "text_encoder.pooling_type=statistics"]


@pytest.fixture(autouse=True)
def more_pairs(run_config: Path) -> None:
    """60 training pairs, of which every twelfth caption stands twice."""
    write_pairs(run_config.parent / "train.parquet", 60, first=20)
    write_pairs(run_config.parent / "val.parquet", 10)


def embeds(trainer: AlignmentTrainer, size: int) -> tuple[Tensor, Tensor]:
    """Of all training pairs, as evaluation sees them, from pictures and captions."""
    pixels, captions = pictures_and_captions(trainer)
    model = trainer._model.eval()
    with torch.no_grad():
        return model.get_image_features(pixels, size), model.get_text_features(**captions, truncate_dim=size)


def pictures_and_captions(trainer: AlignmentTrainer) -> tuple[Tensor, dict[str, Tensor]]:
    train: Any = trainer.train_dataset
    pairs = [train.pair(index) for index in range(len(train))]
    processor: Any = trainer.processing_class
    captions = processor.tokenizer([text for _, text in pairs], padding=True, return_tensors="pt")
    pixels = torch.stack([train.pixels(train.pairs[i], train.view_rng(0, i)) for i in range(len(train))])
    return pixels, {key: captions[key] for key in ("input_ids", "attention_mask")}


def pooled(trainer: AlignmentTrainer) -> tuple[Tensor, Tensor]:
    model = trainer._model
    pixels, captions = pictures_and_captions(trainer)
    with torch.no_grad():
        images = model.vision_encoder.pool(model.vision_encoder.features(pixels))
        return images.double(), model.text_encoder.pool(*model.text_encoder.features(**captions)).double()


@pytest.mark.parametrize("pooling", ["simple", "multihead", "statistics", "none"])
def test_embeddings_are_the_naive_solution_of_all_pairs_whatever_the_pooling(pooling: str, run_config: Path):
    options = [f"{side}_encoder.pooling_type={pooling}" for side in ("vision", "text")]
    if pooling == "none":
        options = [f"{side}_encoder.use_attention_pooling=false" for side in ("vision", "text")]
    trainer = make_trainer(run_config, *GIVEN, *options)
    x, y = pooled(trainer)
    # Statistics may be left to the mean alone.
    candidates = [(columns_x, columns_y) for columns_x in {32, x.shape[1]} for columns_y in {32, y.shape[1]}]
    worst = []
    for columns_x, columns_y in candidates:
        expected = naive_embeds(x[:, :columns_x], y[:, :columns_y], (0.3, 1.0), 1.5)
        differences = []
        for size in (64, 32, 16):
            found = embeds(trainer, size)
            cosines = [torch.nn.functional.normalize(side[:, :size], dim=1).float() for side in expected]
            differences.append(float((found[0] @ found[1].T - cosines[0] @ cosines[1].T).abs().max()))
        worst.append(max(differences))
    assert min(worst) < 2e-3


def test_rows_without_a_direction_start_small_on_both_sides_but_not_at_zero(run_config: Path):
    encoders = [f"{side}_encoder.projection_dim=512" for side in ("vision", "text")]
    trainer = make_trainer(run_config, *GIVEN, *encoders)
    model = trainer._model
    for found, whole in zip(embeds(trainer, 32), embeds(trainer, 512), strict=True):
        spare = whole[:, 64:].square().sum(dim=1)
        assert spare.min() > 1e-6
        assert spare.mean() < 1e-3
        assert found.isfinite().all()
    for encoder in (model.vision_encoder, model.text_encoder):
        assert (encoder.projection.weight != 0).all()
        assert encoder.projection.weight.detach().square().mean() == pytest.approx(1 / 32)  # as of a new layer


def test_what_is_chosen_is_told(run_config: Path, capsys: pytest.CaptureFixture[str]):
    trainer = make_trainer(run_config, SPECTRAL, *STATISTICS, "trainer.disable_tqdm=true")
    told = capsys.readouterr().out
    assert "spectral start of 60 pairs: ridge " in told
    assert "directions carry something on" in told
    assert 0 <= trainer._model.logit_scale.item() <= 4.6052


def test_dropped_captions_are_no_pairs_of_the_start(run_config: Path):
    never, always = (
        make_trainer(run_config, *GIVEN, f"dataset.text_dropout_prob={share}")._model.state_dict()
        for share in (0.0, 1.0)
    )
    for name, value in never.items():
        assert torch.equal(value, always[name]), name


@pytest.mark.parametrize("views", [0, 3])
def test_pairs_are_held_out_with_all_that_share_their_caption(views: int, run_config: Path):
    path = run_config.parent / "train.parquet"
    write_captions(path, [f"number {i // 2}" for i in range(80)])
    options = ["dataset.cache=disk", f"dataset.cache_dir={run_config.parent}/cache", f"dataset.cache_views={views}"]
    trainer = make_trainer(run_config, *options)
    passed = _Pass(load_config(run_config, options), trainer)
    passed.run()
    moments, held_out = passed.gather()
    captions = held_out.caption_ids.tolist()
    assert 2 <= len(set(captions)) <= 20
    assert all(captions.count(caption) == 2 for caption in captions)
    assert moments.count == (80 - len(captions)) * max(1, views)


@pytest.mark.parametrize("cache", ["off", "disk", "pooled"])
def test_a_run_that_starts_spectrally_ends_with_the_same_bits_after_a_kill(cache: str, run_config: Path):
    options = [SPECTRAL, *STATISTICS, f"dataset.cache={cache}", f"dataset.cache_dir={run_config.parent}/cache"]
    whole = make_trainer(run_config, *options, f"trainer.output_dir={run_config.parent}/whole")
    whole.train()
    killed = make_trainer(run_config, *options)
    killed.add_callback(AtStep(7, kill))
    with pytest.raises(Killed):
        killed.train()
    resumed = make_trainer(run_config, *options)
    with torch.no_grad():
        resumed._model.vision_encoder.projection.weight.zero_()  # what counts is the checkpoint
    assert newest_checkpoint(run_config.parent / "run") == run_config.parent / "run/checkpoint-0"
    resumed.train(newest_checkpoint(run_config.parent / "run"))
    assert_equal_bits(what_is_left(whole), what_is_left(resumed))
    steps = [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry]
    assert steps == [0, 15, 30]


def test_the_best_model_may_be_the_start(run_config: Path):
    known = f"dataset.val_parquet={run_config.parent}/train.parquet"
    trainer = make_trainer(run_config, SPECTRAL, "optimization.lr=10", "trainer.epochs=1", known)
    start = {name: value.clone() for name, value in trainer.trained_state_dict().items()}
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[0] < losses[1]
    assert trainer.loaded_best_step == 0
    for name, value in trainer.trained_state_dict().items():
        assert torch.equal(value, start[name]), name


def test_no_epochs_are_a_whole_run(run_config: Path):
    config = load_config(run_config, [SPECTRAL, *STATISTICS, "trainer.epochs=0"])
    assert align(config, SignalListener()) == 0
    folder = run_config.parent / "run"
    metrics = json.loads((folder / "final_metrics.json").read_text())
    chance = 0.1
    assert metrics["val/i2t_r1"] >= chance
    names = {path.name for path in folder.iterdir()}
    assert {"training_curves.png", "mrl_performance.png", "report.html", "metrics.csv", "checkpoint-0"} <= names
    model, _ = load_model(str(folder / "model"))
    assert model.vision_encoder.pooled_size == 4 * 32
    with pytest.raises(ConfigError, match=r"holds a finished run; raise trainer\.epochs to extend it"):
        align(config, SignalListener())
    longer = load_config(run_config, [SPECTRAL, *STATISTICS, "trainer.epochs=1"])
    assert align(longer, SignalListener()) == 0
    assert (folder / "checkpoint-15").exists()


def test_a_signal_in_the_pass_ends_it_and_the_next_run_starts_it_anew(run_config: Path, monkeypatch):
    import training.initialization as initialization

    config, take = load_config(run_config, [*GIVEN, "trainer.epochs=0"]), initialization._Pass._take
    monkeypatch.setattr(initialization, "_BATCH_SIZE", 8)

    def interrupted(self: Any, *batch: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        take(self, *batch)

    signals = SignalListener()
    with monkeypatch.context() as patch, signals.listening():
        patch.setattr(initialization._Pass, "_take", interrupted)
        assert align(config, signals) == 75
    assert (run_config.parent / "run/preempted.json").exists()
    assert align(config, SignalListener()) == 0
    assert not (run_config.parent / "run/preempted.json").exists()


def test_towers_that_train_start_from_the_closed_form_too(run_config: Path):
    unfrozen = ["vision_encoder.freeze=false", "text_encoder.freeze=false"]
    frozen = make_trainer(run_config, *GIVEN, f"trainer.output_dir={run_config.parent}/frozen")
    trained = make_trainer(run_config, *GIVEN, *unfrozen, "trainer.epochs=1")
    for ours, expected in zip(embeds(trained, 16), embeds(frozen, 16), strict=True):
        torch.testing.assert_close(ours, expected)
    trained.train()
    assert trained.state.global_step == 15


def write_captions(path: Path, captions: list[str]) -> None:
    columns = {"image_bytes": [picture(f"{i}") for i in range(len(captions))], "caption": captions}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def test_too_few_pairs_are_refused(run_config: Path):
    write_pairs(run_config.parent / "train.parquet", 31)
    with pytest.raises(DataError, match=r"31 pairs are too few for optimization\.init=spectral, which wants 32"):
        make_trainer(run_config, SPECTRAL)


def test_one_caption_for_all_is_refused(run_config: Path):
    write_captions(run_config.parent / "train.parquet", ["the same"] * 40)
    with pytest.raises(DataError, match="captions are nearly all the same"):
        make_trainer(run_config, SPECTRAL)


def test_one_picture_for_all_is_refused(run_config: Path):
    path = run_config.parent / "train.parquet"
    columns = {"image_bytes": [picture("same")] * 40, "caption": [f"number {i}" for i in range(40)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError, match="the same features for every picture"):
        make_trainer(run_config, SPECTRAL, "dataset.cache=disk", f"dataset.cache_dir={run_config.parent}/cache")


def test_towers_that_train_want_epochs(run_config: Path):
    with pytest.raises(ConfigError, match=r"trainer\.epochs: a tower that trains \(freeze: false\) wants epochs"):
        load_config(run_config, [SPECTRAL, "trainer.epochs=0", "text_encoder.freeze=false"])
    with pytest.raises(ConfigError, match=r"trainer\.epochs: must be above 0, got 0"):
        load_config(run_config, ["trainer.epochs=0"])


@pytest.mark.parametrize("pooling", ["simple", "statistics", "multihead"])
def test_pooled_features_are_those_that_kept_tokens_give(pooling: str, run_config: Path):
    options = [*GIVEN, *(f"{side}_encoder.pooling_type={pooling}" for side in ("vision", "text"))]
    folder, trained = run_config.parent, {}
    for cache in ("disk", "pooled"):
        trainer = make_trainer(run_config, *options, f"dataset.cache={cache}", f"dataset.cache_dir={folder}/cache",
                               f"trainer.output_dir={folder}/{cache}", "trainer.epochs=1")  # fmt: skip
        trained[cache] = trainer
        trainer.train()
    model, from_tokens, pooled = (trained["pooled"]._model, *(trained[cache].train_dataset[7] for cache in trained))
    for side, encoder in (("image", model.vision_encoder), ("text", model.text_encoder)):
        with torch.no_grad():
            expected = encoder.pool(from_tokens[f"{side}_features"].unsqueeze(0))[0]
        torch.testing.assert_close(pooled[f"{side}_features"].float(), expected, rtol=2e-3, atol=2e-3)
    for name, value in trained["pooled"]._model.vision_encoder.pooling.named_parameters():
        assert value.grad is None, name
    sizes = {
        cache: sum(file.stat().st_size for file in trained[cache].train_dataset.image_cache.folder.iterdir())
        for cache in trained
    }
    assert sizes["pooled"] < sizes["disk"]
