"""A batch in chunks has the embeddings and gradients of the whole batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassModel
from modeling_edgeglass.chunking import run_in_chunks
from tests.interruptions import what_is_left
from tests.runs import make_trainer


@pytest.fixture
def trained(config: EdgeGlassConfig) -> EdgeGlassModel:
    """Both towers train, without dropout."""
    config.vision_freeze = config.text_freeze = False
    for backbone in (config.vision_config, config.text_config):
        backbone.hidden_dropout_prob = backbone.attention_probs_dropout_prob = 0.0
    torch.manual_seed(0)
    return EdgeGlassModel(config)


def gradients(model: EdgeGlassModel, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    """Each gradient by its own length."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= relative * value.norm() + 1e-9, name


@pytest.mark.parametrize("chunk_size", [1, 2, 4, 6, 7])
def test_gradients_are_those_of_the_whole_batch(chunk_size: int, trained: EdgeGlassModel, batch):
    expected = gradients(trained, lambda: trained(**batch, return_loss=True, step=0).loss)
    found = gradients(trained, lambda: trained(**batch, return_loss=True, step=0, tower_chunk_size=chunk_size).loss)
    assert any(name.startswith("text_encoder.backbone") for name in expected)
    assert_close(found, expected)


def test_frozen_towers_and_kept_features_may_be_chunked_too(model: EdgeGlassModel, batch):
    expected = gradients(model, lambda: model(**batch, return_loss=True, step=0).loss)
    found = gradients(model, lambda: model(**batch, return_loss=True, step=0, tower_chunk_size=2).loss)
    assert_close(found, expected)
    with torch.no_grad():
        features = model.vision_encoder.features(batch["pixel_values"])
        text_features, mask = model.text_encoder.features(batch["input_ids"], batch["attention_mask"])
    kept = {"image_features": features, "text_features": text_features, "attention_mask": mask}
    found = gradients(model, lambda: model(**kept, return_loss=True, step=0, tower_chunk_size=4).loss)
    assert_close(found, expected)


def test_a_chunk_run_again_draws_what_it_drew_before():
    """Against a naive version: keep every chunk's graph, draw once."""
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 4))
    inputs = torch.randn(7, 8)

    def gradient(run: Callable[[], Tensor]) -> Tensor:
        tower.zero_grad()
        torch.manual_seed(1)
        outputs = run()
        torch.randn(3)  # what the loss draws does not disturb it
        (outputs @ outputs.T).softmax(dim=1).diagonal().sum().backward()
        return tower[0].weight.grad.clone()

    expected = gradient(lambda: torch.cat([tower(chunk) for chunk in inputs.split(3)]))
    torch.testing.assert_close(gradient(lambda: run_in_chunks(tower, 3, inputs)), expected)
    other_draws = [
        checkpoint(tower, chunk, use_reentrant=False, preserve_rng_state=False) for chunk in inputs.split(3)
    ]
    assert not torch.allclose(gradient(lambda: torch.cat(other_draws)), expected)


def test_running_statistics_take_every_chunk_in_once():
    def tower() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 2))

    inputs = torch.randn(6, 3, 5, 5)
    naive, chunked = tower(), tower()
    torch.cat([naive(chunk) for chunk in inputs.split(2)]).square().sum().backward()
    run_in_chunks(chunked, 2, inputs).square().sum().backward()
    assert torch.equal(chunked[1].running_mean, naive[1].running_mean)
    assert torch.equal(chunked[1].running_var, naive[1].running_var)
    assert int(chunked[1].num_batches_tracked) == 3
    assert chunked[1].track_running_stats
    torch.testing.assert_close(chunked[0].weight.grad, naive[0].weight.grad)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_no_activation_of_a_tower_is_kept_for_the_backward_pass(chunk_size: int | None):
    tower, inputs = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(6, 8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        run_in_chunks(tower, chunk_size, inputs)
    hidden = [value for value in kept if value.shape[-1:] == (16,)]
    assert bool(hidden) == (chunk_size is None)
    if chunk_size is not None:
        assert sum(value.numel() for value in kept) <= inputs.numel()  # the inputs alone, to run again


def test_a_run_in_chunks_ends_as_one_without(run_config: Path):
    options = ["vision_encoder.freeze=false", "optimization.lr=1e-4", "dataset.batch_size=8", "trainer.max_steps=3"]
    whole = make_trainer(run_config, *options)
    whole.train()
    chunked = make_trainer(run_config, *options, "optimization.tower_chunk_size=3",
                           f"trainer.output_dir={run_config.parent}/chunked")  # fmt: skip
    chunked.train()
    expected, found = what_is_left(whole), what_is_left(chunked)
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-3, atol=1e-5)
    for before, after in zip(expected["log"], found["log"], strict=True):
        assert after.get("loss", 0) == pytest.approx(before.get("loss", 0), rel=1e-5)
