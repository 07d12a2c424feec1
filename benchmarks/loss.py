"""Time and memory of the loss at all sizes, against one full-size CLIP loss and sentence-transformers' MatryoshkaLoss.

    python benchmarks/loss.py

Six sizes of 4096 dimensions, forward and backward, in two threads. Needs the extra `bench`.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import REPEATS, alternate, in_fresh_process, peak_memory, report
from modeling_edgeglass import AlignmentLoss

DIMENSIONS = (4096, 2048, 1024, 512, 256, 128)
SCALE = 1 / 0.07  # CLIP's first
THREADS = 2
LARGE = 8192
CONDITIONS = {"D": DIMENSIONS[0], "sizes": DIMENSIONS, "dtype": "float32", "threads": THREADS}
CLIP = "textbook CLIP loss, full size alone"
MATRYOSHKA = "sentence-transformers' MatryoshkaLoss, six sizes"


def main() -> None:
    torch.set_num_threads(THREADS)
    if len(sys.argv) > 1:
        side, num_pairs = sys.argv[1:]
        print(growth_of_memory(side, int(num_pairs)))
        return
    assert_equal_losses_and_gradients()
    for B, bound in ((256, "<= 1.1"), (1024, "<= 1.15")):
        medians = alternate({side: partial(step, side, *make_pairs(B)) for side in LOSSES})
        milliseconds = {side: 1e3 * value for side, value in medians.items()}
        all_sizes, clip, matryoshka = (milliseconds[side] for side in ("all sizes", "clip", "matryoshka"))
        conditions = {"unit": "ms", "B": B, "repeats": REPEATS, **CONDITIONS}
        report(
            f"loss/time by one full-size loss, B={B}",
            ours=all_sizes,
            peer=clip,
            peer_is=CLIP,
            ratio=all_sizes / clip,
            bound=bound,
            **conditions,
        )
        report(
            f"loss/speed-up over MatryoshkaLoss, B={B}",
            ours=all_sizes,
            peer=matryoshka,
            peer_is=MATRYOSHKA,
            ratio=matryoshka / all_sizes,
            bound=">= 2",
            **conditions,
        )
    report_large()


def report_large() -> None:
    sides = ("all sizes", "clip")
    processes = {side: partial(in_fresh_process, __file__, side, LARGE) for side in sides}
    grown = alternate(processes, measure=lambda run: run(), warm_up=False)
    memory = [grown[side] for side in sides]
    pairs = make_pairs(LARGE)
    medians = alternate({side: partial(step, side, *pairs) for side in sides}, warm_up=False)
    time = [medians[side] for side in sides]
    for name, unit, (ours, peer), bound in (
        ("peak memory", "MiB", memory, "<= 0.25"),
        ("time", "s", time, "<= 2"),
    ):
        report(
            f"loss/{name} by one full-size loss, B={LARGE}",
            ours=ours,
            peer=peer,
            unit=unit,
            peer_is=CLIP,
            ratio=ours / peer,
            bound=bound,
            B=LARGE,
            repeats=REPEATS,
            **CONDITIONS,
        )


def make_pairs(num_pairs: int) -> tuple[Tensor, Tensor]:
    """Image and text embeddings (num_pairs, D) that are somewhat alike."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(num_pairs, DIMENSIONS[0], generator=generator) for _ in range(2))
    texts.add_(images)
    return images.requires_grad_(), texts.requires_grad_()


def all_sizes(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """Ours; that captions are compared is part of it."""
    caption_ids = torch.arange(len(images))
    loss = AlignmentLoss(0.0, 1.0, DIMENSIONS, sample_single_mrl_dim=False)
    return loss(images, texts, logit_scale=logit_scale, caption_ids=caption_ids).loss


def clip(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    targets = torch.arange(len(images))
    logits = logit_scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class GivenEmbeddings(nn.Module):
    """All that sentence-transformers' losses ask of a model; its features are the embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return DIMENSIONS[0]


def matryoshka(images: Tensor, texts: Tensor, logit_scale: Tensor) -> Tensor:
    """The peer, with weights that make its sum a mean over sizes."""
    # Here, because the processes that measure memory have no use for it.
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    model = GivenEmbeddings()
    directions = ("query_to_doc", "doc_to_query")
    loss = MultipleNegativesRankingLoss(model, logit_scale, directions=directions, partition_mode="per_direction")
    weights = [1 / len(DIMENSIONS)] * len(DIMENSIONS)
    features = [{"sentence_embedding": embeds} for embeds in (images, texts)]
    return MatryoshkaLoss(model, loss, DIMENSIONS, weights)(features, labels=None)


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "all sizes": all_sizes,
    "clip": clip,
    "matryoshka": matryoshka,
}


def step(side: str, images: Tensor, texts: Tensor) -> list[Tensor]:
    """Loss, and its gradients by the embeddings and the scale."""
    logit_scale = torch.tensor(SCALE, requires_grad=True)
    loss = LOSSES[side](images, texts, logit_scale)
    return [loss.detach(), *torch.autograd.grad(loss, (images, texts, logit_scale))]


def assert_equal_losses_and_gradients() -> None:
    pairs = make_pairs(256)
    torch.testing.assert_close(step("all sizes", *pairs), step("matryoshka", *pairs), rtol=1e-3, atol=1e-6)


def growth_of_memory(side: str, num_pairs: int) -> float:
    """MiB by which the peak of resident memory rises in one step, in this process."""
    step(side, *make_pairs(64))  # what is loaded and set up once
    return peak_memory(partial(step, side, *make_pairs(num_pairs))) / 2**20


if __name__ == "__main__":
    main()
