"""Two ranks with gloo are one process with the whole batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from modeling_edgeglass import AlignmentLoss, EdgeGlassConfig, EdgeGlassModel
from modeling_edgeglass.distributed import gather, gather_with_grad

RANKS = 2


def in_two_processes(function, *args) -> None:
    torch.multiprocessing.spawn(_start, args=(function, *args), nprocs=RANKS)


def _start(rank: int, function, folder: Path, *args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    function(rank, folder, *args)
    dist.barrier()
    dist.destroy_process_group()


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 8, 16, generator=generator, dtype=torch.float64)
    return images, texts, torch.tensor([1, 2, 3, 1, 4, 1, 5, 2])  # equal captions on both ranks


def loss_of_a_rank(rank: int, folder: Path, sample_single_mrl_dim: bool) -> None:
    images, texts, caption_ids = pairs()
    rows = slice(4 * rank, 4 * rank + 4)
    images, texts = images[rows].requires_grad_(), texts[rows].requires_grad_()
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    loss = AlignmentLoss(mrl_dimensions=(8, 4), sample_single_mrl_dim=sample_single_mrl_dim)
    output = loss(images, texts, logit_scale=scale, caption_ids=caption_ids[rows], step=3)
    output.loss.backward()
    local = loss(images, texts, logit_scale=scale, caption_ids=caption_ids[rows], step=3, gather_negatives=False)
    result = {
        "loss": output.loss.detach(),
        "size": output.mrl_dimension,
        "images": images.grad,
        "texts": texts.grad,
        "scale": scale.grad,
        "local": local.loss.detach(),
    }
    torch.save(result, folder / f"{rank}.pt")


@pytest.mark.parametrize("sample_single_mrl_dim", [True, False])
def test_loss_and_gradients_are_those_of_one_process_with_the_whole_batch(sample_single_mrl_dim, tmp_path: Path):
    in_two_processes(loss_of_a_rank, tmp_path, sample_single_mrl_dim)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    images, texts, caption_ids = pairs()
    images.requires_grad_()
    texts.requires_grad_()
    scale = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    loss = AlignmentLoss(mrl_dimensions=(8, 4), sample_single_mrl_dim=sample_single_mrl_dim)
    output = loss(images, texts, logit_scale=scale, caption_ids=caption_ids, step=3)
    output.loss.backward()
    assert {result["size"] for result in results} == {output.mrl_dimension}

    def mean(name: str) -> torch.Tensor:
        return torch.stack([result[name] for result in results]).mean(dim=0)

    torch.testing.assert_close(mean("loss"), output.loss.detach())
    torch.testing.assert_close(mean("scale"), scale.grad)
    for name, grad in (("images", images.grad), ("texts", texts.grad)):
        # DDP averages the gradients of a parameter over ranks, which divides these by their number.
        torch.testing.assert_close(torch.cat([result[name] for result in results]) / RANKS, grad)
    for rank, result in enumerate(results):
        rows = slice(4 * rank, 4 * rank + 4)
        alone = loss(images[rows], texts[rows], logit_scale=scale, caption_ids=caption_ids[rows], step=3)
        torch.testing.assert_close(result["local"], alone.loss.detach())


def gradients_of_a_rank(rank: int, folder: Path, config: EdgeGlassConfig, batch: dict[str, torch.Tensor]) -> None:
    model = build(config)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    wrapped(
        **{key: value[3 * rank : 3 * rank + 3] for key, value in batch.items()}, return_loss=True, step=0
    ).loss.backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, folder / "grads.pt")


def build(config: EdgeGlassConfig) -> EdgeGlassModel:
    torch.manual_seed(0)
    return EdgeGlassModel(config).train()


def test_ddp_gradients_are_those_of_one_process_with_the_whole_batch(config: EdgeGlassConfig, batch, tmp_path: Path):
    in_two_processes(gradients_of_a_rank, tmp_path, config, batch)
    model = build(config)
    model(**batch, return_loss=True, step=0).loss.backward()
    gathered = torch.load(tmp_path / "grads.pt")
    assert "logit_scale" in gathered
    for name, gradient in gathered.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4)


def test_one_process_gathers_itself():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather(rows) is rows
    assert gather_with_grad(rows) is rows


def gather_in_order(rank: int, folder: Path) -> None:
    rows = torch.full((2, 1), float(rank))
    assert gather(rows).flatten().tolist() == [0, 0, 1, 1]
    assert gather_with_grad(rows).flatten().tolist() == [0, 0, 1, 1]


def test_rows_come_in_the_order_of_ranks(tmp_path: Path):
    in_two_processes(gather_in_order, tmp_path)
