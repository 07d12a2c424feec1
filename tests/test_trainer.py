from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import make_trainer
from training.errors import SickTrainingError
from training.retrieval import retrieval_metrics
from training.trainer import AlignmentTrainer


def train_logs(trainer: AlignmentTrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def eval_logs(trainer: AlignmentTrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "eval_loss" in entry]


def test_a_run_learns_logs_the_parts_and_keeps_the_best_model(run_config: Path):
    trainer = make_trainer(run_config, "trainer.epochs=40", "dataset.text_dropout_prob=0")
    trainer.train()
    logs = train_logs(trainer)
    assert [entry["step"] for entry in logs] == list(range(1, 201))
    for entry in logs:
        assert entry["loss"] == pytest.approx(0.25 * entry["loss_clip"] + entry["loss_mrl"], rel=1e-4)
    assert sum(entry["loss"] for entry in logs[-5:]) < 0.5 * sum(entry["loss"] for entry in logs[:5])
    best = min(entry["eval_loss"] for entry in eval_logs(trainer))
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def test_learning_rate_warms_up_and_falls_to_zero(run_config: Path):
    trainer = make_trainer(run_config, "trainer.epochs=4", "optimization.warmup_ratio=0.25")
    trainer.train()
    rates = [entry["learning_rate"] for entry in train_logs(trainer)]
    assert rates.index(max(rates)) == 5
    assert max(rates) == pytest.approx(0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert trainer._get_learning_rate() == pytest.approx(0, abs=1e-9)


def test_frozen_backbones_have_no_optimizer_state_and_do_not_move(run_config: Path):
    trainer = make_trainer(run_config)
    model = trainer._model
    frozen = {name: p.clone() for name, p in model.named_parameters() if ".backbone." in name}
    trainer.train()
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    trained = {name for name, p in model.named_parameters() if id(p) in in_optimizer}
    assert trained == {name for name, _ in model.named_parameters() if ".backbone." not in name}
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_weight_decay_is_for_matrices_alone(run_config: Path):
    overrides = ["vision_encoder.freeze=false", "vision_encoder.pooling_type=multihead"]
    trainer = make_trainer(run_config, *overrides)
    decayed, plain = trainer.create_optimizer().param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.01, 0.0)
    undecayed = {id(p) for p in plain["params"]}
    names = {name for name, p in trainer._model.named_parameters() if id(p) in undecayed}
    assert "logit_scale" in names
    assert all(name.endswith(("bias", "norm.weight", "score", "logit_scale")) or "norm" in name for name in names)
    assert trainer._model.vision_encoder.projection.weight in set(decayed["params"])


def test_freeze_false_trains_the_tower(run_config: Path):
    trainer = make_trainer(run_config, "vision_encoder.freeze=false", "trainer.max_steps=2")
    before = trainer._model.vision_encoder.backbone.layers[0].mlp.fc1.weight.clone()
    trainer.train()
    assert not torch.equal(trainer._model.vision_encoder.backbone.layers[0].mlp.fc1.weight, before)


def test_evaluation_is_one_encode_and_the_metrics_of_it(run_config: Path):
    trainer = make_trainer(run_config)
    metrics = trainer.evaluate()
    model = trainer._model.eval()
    items = [trainer.eval_dataset[i] for i in range(10)]
    batch = trainer.data_collator(items)
    with torch.no_grad():
        output = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    expected = retrieval_metrics(output.image_embeds, output.text_embeds, [32, 16])
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    losses = [
        model.alignment_loss(output.image_embeds[rows], output.text_embeds[rows], logit_scale=model.logit_scale.exp())
        for rows in (slice(0, 5), slice(5, 10))  # ten pairs in batches of four: two fixed batches of five
    ]
    assert metrics["eval_loss"] == pytest.approx(sum(loss.loss.item() for loss in losses) / 2, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(0.25 * metrics["eval_loss_clip"] + metrics["eval_loss_mrl"], rel=1e-5)


def test_evaluation_does_not_depend_on_the_step_or_on_workers(run_config: Path):
    trainer = make_trainer(run_config, "trainer.dataloader_num_workers=2")
    reference = trainer.evaluate()
    trainer.state.global_step = 7
    trainer.args.dataloader_num_workers = 0
    again = trainer.evaluate()
    for name, value in reference.items():
        if not name.endswith(("runtime", "per_second", "time")):
            assert again[name] == value, name


def test_logged_loss_is_the_mean_over_accumulated_batches(run_config: Path):
    trainer = make_trainer(run_config, "trainer.gradient_accumulation_steps=2", "trainer.max_steps=2")
    trainer.train()
    for entry in train_logs(trainer):
        assert entry["loss"] == pytest.approx(0.25 * entry["loss_clip"] + entry["loss_mrl"], rel=1e-4)
        assert 0.5 < entry["loss"] < 6


def test_batches_of_an_accumulated_step_share_the_matryoshka_size(run_config: Path, monkeypatch):
    trainer = make_trainer(run_config, "trainer.gradient_accumulation_steps=2", "trainer.max_steps=2")
    steps = []
    original = trainer._model.alignment_loss.forward

    def record(*args, **kwargs):
        steps.append(kwargs.get("step"))
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer._model.alignment_loss, "forward", record)
    trainer.train()
    assert [step for step in steps if step is not None][:4] == [0, 0, 1, 1]


def test_early_stopping_on_request(run_config: Path):
    overrides = ["optimization.early_stopping_patience=2", "trainer.epochs=40", "optimization.lr=0.3"]
    trainer = make_trainer(run_config, *overrides)
    trainer.train()
    losses = [entry["eval_loss"] for entry in eval_logs(trainer)]
    assert len(losses) < 40
    assert losses.index(min(losses)) == len(losses) - 3


def test_bf16_trains_as_float32_does_but_for_rounding(run_config: Path):
    full, half = (
        make_trainer(run_config, "trainer.max_steps=3", f"trainer.bf16={bf16}") for bf16 in ("false", "true")
    )
    full.train()
    half.train()
    for exact, rounded in zip(train_logs(full), train_logs(half), strict=True):
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.05)
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.float32}
    assert half.evaluate()["eval_loss"] != full.evaluate()["eval_loss"]  # autocast was on, in evaluation too


def test_equal_seeds_give_equal_bits_and_other_seeds_others(run_config: Path):
    def weights(seed: int) -> torch.Tensor:
        trainer = make_trainer(run_config, f"trainer.seed={seed}", "trainer.max_steps=3")
        trainer.train()
        return trainer._model.vision_encoder.projection.weight.detach().clone()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_a_diverged_model_stops_with_a_clear_word(run_config: Path):
    trainer = make_trainer(run_config)
    torch.nn.init.constant_(trainer._model.vision_encoder.projection.bias, float("nan"))
    with pytest.raises(SickTrainingError, match=r"^embeddings are NaN or infinite.*\(step 0\)$"):
        trainer.evaluate()
