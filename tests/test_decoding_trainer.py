"""A decoding run: its loss, its evaluation, and that it goes on to the bit."""

import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F

from modeling_edgeglass.encoders import VisionEncoder
from tests.decoding_runs import make_decoding_trainer, write_decoding_config
from tests.interruptions import AtStep, assert_equal_tensors, kill, stop_workers, train_until_killed
from training.checkpoints import newest_checkpoint
from training.decoding.trainer import DecodingTrainer, embed, with_noise
from training.errors import ConfigError


@pytest.fixture
def decoding_config(vision_dir: str, text_dir: str, tmp_path: Path) -> Path:
    return write_decoding_config(tmp_path, vision_dir, text_dir)


def evaluations(trainer: DecodingTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


@pytest.mark.parametrize("source", ["images", "text"])
def test_training_lowers_the_loss_of_pictures_it_has_not_seen(decoding_config: Path, source: str):
    trainer = make_decoding_trainer(decoding_config, f"dataset.source={source}", "trainer.epochs=12")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    first, *_, last = evaluations(trainer)
    assert last["eval_loss"] < first["eval_loss"] - 0.2
    for name, value in trainer.model.state_dict().items():
        moved = not torch.equal(value, before[name])
        assert moved == (name in trainer.model.trained_state_dict() and name != "bridge.token_scale"), name


def test_evaluation_is_the_mean_over_tokens_of_good_rows(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config, "trainer.per_device_eval_batch_size=4")
    whole = pyarrow.parquet.read_table(decoding_config.parent / "val.parquet")
    metrics = trainer.evaluate()
    model, sums, count = trainer.model.eval(), dict.fromkeys((64, 32, 16), 0.0), 0
    for i in range(6):
        batch = trainer.data_collator([trainer.eval_dataset[i]])
        said = batch["labels"] != -100
        count += int(said.sum())
        for size in sums:
            inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "labels")}
            sums[size] += model(**inputs, truncate_dim=size).loss.item() * int(said.sum())
    assert metrics["eval_loss"] == pytest.approx(sum(sums.values()) / 3 / count, rel=1e-5)
    for size, name in ((64, "eval_perplexity"), (16, "eval_perplexity@16")):
        assert metrics[name] == pytest.approx(math.exp(sums[size] / count), rel=1e-5)
    bad = pyarrow.table(
        {
            "image_bytes": [*whole["image_bytes"].to_pylist(), b"no picture"],
            "caption": [*whole["caption"].to_pylist(), "a box"],
        }
    )
    pyarrow.parquet.write_table(bad, decoding_config.parent / "val.parquet")
    options = ["trainer.per_device_eval_batch_size=3", "dataset.max_bad_fraction=1"]
    with_bad = make_decoding_trainer(decoding_config, *options).evaluate()
    assert with_bad["eval_bad_rows"] == 1
    for name in ("eval_loss", "eval_perplexity@32"):
        assert with_bad[name] == pytest.approx(metrics[name], rel=1e-5)


def test_small_batches_of_a_step_add_up_to_a_large_one(decoding_config: Path):
    losses = {}
    for batch_size, steps in ((4, 1), (2, 2), (1, 4)):
        trainer = make_decoding_trainer(
            decoding_config,
            f"dataset.batch_size={batch_size}",
            f"trainer.gradient_accumulation_steps={steps}",
            "trainer.max_steps=3",
            "trainer.eval_strategy=no",
            "trainer.save_strategy=no",
        )
        # The order of samples is that of batches: take the same four each time.
        trainer._get_train_sampler = lambda dataset=None: [(0, i) for i in range(12)]
        trainer._sampler = type("Sampler", (), {"set_epoch": lambda self, epoch: None})()
        trainer.train()
        losses[batch_size] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[2] == pytest.approx(losses[4], rel=1e-3)
    assert losses[1] == pytest.approx(losses[4], rel=1e-3)


@pytest.mark.parametrize(
    "overrides", [(), ("decoding.language_training=lora",), ("dataset.source=text", "dataset.cache=pooled")]
)
def test_a_killed_run_ends_with_the_same_bits(decoding_config: Path, overrides: tuple[str, ...]):
    whole = make_decoding_trainer(decoding_config, *overrides, f"trainer.output_dir={decoding_config.parent}/whole")
    whole.train()
    killed = make_decoding_trainer(decoding_config, *overrides)
    killed.add_callback(AtStep(5, kill))
    train_until_killed(killed)
    resumed = make_decoding_trainer(decoding_config, *overrides)
    resumed.train(resume_from_checkpoint=newest_checkpoint(resumed.args.output_dir))
    stop_workers()
    assert_equal_tensors(resumed.model.trained_state_dict(), whole.model.trained_state_dict())
    assert [entry["eval_loss"] for entry in evaluations(resumed)] == [e["eval_loss"] for e in evaluations(whole)]


def test_a_step_from_what_is_kept_never_runs_the_vision_tower(decoding_config: Path, monkeypatch: pytest.MonkeyPatch):
    plain = make_decoding_trainer(decoding_config).evaluate()
    trainer = make_decoding_trainer(decoding_config, "dataset.cache=pooled")
    monkeypatch.setattr(VisionEncoder, "features", lambda *_: pytest.fail("the vision tower ran"))
    trainer.train()
    assert evaluations(trainer)[0]["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-3)


def test_noise_has_the_length_asked_for():
    embeds = F.normalize(torch.randn(500, 64), dim=1)
    assert torch.equal(with_noise(embeds, 0.0), F.normalize(embeds, dim=1))
    for length in (0.5, 2.0):
        noisy = with_noise(embeds, length)
        torch.testing.assert_close(noisy.norm(dim=1), torch.ones(500))
        # The noise is orthogonal to the embedding but for 1 / sqrt(D).
        assert (noisy * embeds).sum(dim=1).mean().item() == pytest.approx((1 + length**2) ** -0.5, abs=0.02)


def test_captions_stand_where_their_alignment_puts_them(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config, "dataset.source=text")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    inputs = trainer.processing_class.alignment_processor(text=batch["answers"])
    expected = trainer.model.alignment.get_text_features(**inputs)
    torch.testing.assert_close(embed(trainer.model.alignment, batch), expected)


def test_what_a_decoder_cannot_do_is_refused_before_the_first_step(decoding_config: Path):
    with pytest.raises(ConfigError, match=r"label_smoothing_factor: labels cannot be smoothed behind a prefix"):
        make_decoding_trainer(decoding_config, "trainer.label_smoothing_factor=0.1")
    with pytest.raises(ConfigError, match=r"the prompt takes \d+ tokens of the 252 .* \d+ are left for an answer"):
        make_decoding_trainer(decoding_config, "dataset.max_text_length=250")
    language = decoding_config.parent / "language"
    with pytest.raises(ConfigError, match=r"is no alignment: its config\.json tells of a model of type qwen3"):
        make_decoding_trainer(decoding_config, f"decoding.alignment={language}")
    with pytest.raises(ConfigError, match=r"decoding\.alignment: .* is no alignment: .*run_alignment\.py makes one"):
        make_decoding_trainer(decoding_config, "decoding.alignment=/no/where")
    with pytest.raises(ConfigError, match=r"language model '/no/where' cannot be loaded"):
        make_decoding_trainer(decoding_config, "decoding.language_model=/no/where")
    with pytest.raises(ConfigError, match=r"there is no metric 'perplexity@8'; did you mean 'perplexity'"):
        make_decoding_trainer(decoding_config, "trainer.metric_for_best_model=perplexity@8")
