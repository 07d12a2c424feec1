import itertools

import pytest
import torch
import torch.nn.functional as F

from modeling_edgeglass import AlignmentLoss
from modeling_edgeglass.prefix_info_nce import prefix_info_nce

B, D = 12, 64
DIMENSIONS = (8, 16, 40, D)
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}


def naive_info_nce(queries, gallery, scale, false_negatives, first_match, both_ways) -> torch.Tensor:
    """A loss per size, each with unit vectors and a matrix of logits of its own."""
    targets = torch.arange(len(queries)) + first_match
    losses = []
    for dimension in DIMENSIONS:
        logits = scale * F.normalize(queries[:, :dimension], dim=-1) @ F.normalize(gallery[:, :dimension], dim=-1).T
        logits = logits.masked_fill(false_negatives, float("-inf"))
        loss = F.cross_entropy(logits, targets)
        losses.append((loss + F.cross_entropy(logits.T, targets)) / 2 if both_ways else loss)
    return torch.stack(losses)


def vectors(number: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Of different lengths; one is zero, another starts with zeros."""
    rows = torch.randn(number, D, generator=generator, dtype=dtype) * torch.linspace(0.1, 9, number).unsqueeze(1)
    rows[3], rows[5, :20] = 0, 0
    return rows.requires_grad_()


def assert_as_close(actual, expected, tolerance: float) -> None:
    """Every vector to within `tolerance` of its length."""
    for ours, naive in zip(actual, expected, strict=True):
        errors = torch.linalg.vector_norm(ours - naive, dim=-1) / torch.linalg.vector_norm(naive, dim=-1)
        assert errors.max() < tolerance


@pytest.mark.parametrize("kept", [1 << 24, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("tile", [1024, 5, 1], ids="tile {}".format)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_losses_and_gradients_are_those_of_the_naive_loop(dtype, tile, kept, monkeypatch):
    monkeypatch.setattr("modeling_edgeglass.prefix_info_nce._TILE", tile)
    monkeypatch.setattr("modeling_edgeglass.prefix_info_nce._MAX_KEPT_PRODUCTS", kept)
    generator = torch.Generator().manual_seed(0)
    for (both_ways, G, first_match), masked in itertools.product(((True, B, 0), (False, 20, 3)), (True, False)):
        queries, gallery = vectors(B, dtype, generator), vectors(G, dtype, generator)
        scale = torch.tensor(9.0, dtype=dtype, requires_grad=True)
        captions = torch.randint(6, (G,), generator=generator) if masked else torch.arange(G)
        own = captions[first_match : first_match + B]
        false_negatives = (own.unsqueeze(1) == captions) & (
            torch.arange(B).unsqueeze(1) + first_match != torch.arange(G)
        )
        ours = prefix_info_nce(
            queries,
            gallery,
            scale,
            DIMENSIONS,
            query_captions=own if masked else None,
            gallery_captions=captions if masked else None,
            first_match=first_match,
            both_ways=both_ways,
        )
        naive = naive_info_nce(queries, gallery, scale, false_negatives, first_match, both_ways)
        weights = torch.tensor([0.3, 0.0, 1.0, 0.25], dtype=dtype)  # a size of no weight is one among the others
        inputs = (queries, gallery, scale)
        assert_as_close(
            (ours, *torch.autograd.grad(ours @ weights, inputs)),
            (naive, *torch.autograd.grad(naive @ weights, inputs)),
            TOLERANCES[dtype],
        )


def test_opposite_vectors_at_the_highest_scale_lose_no_number():
    embeds = F.normalize(torch.randn(4, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    queries = torch.cat((embeds, -embeds)).requires_grad_()
    gallery, scale = -queries.detach(), torch.tensor(100.0)  # matches are the farthest: e**-200 is zero in float32
    loss = prefix_info_nce(queries, gallery, scale, (D,), both_ways=True)
    torch.testing.assert_close(loss, torch.tensor([200.0]))
    assert torch.autograd.grad(loss.sum(), queries)[0].isfinite().all()


def test_gradients_may_be_asked_for_twice():
    queries, gallery = torch.randn(2, B, D, requires_grad=True).unbind()
    loss = prefix_info_nce(queries, gallery, torch.tensor(9.0), DIMENSIONS, both_ways=True).sum()
    first = torch.autograd.grad(loss, (queries, gallery), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (queries, gallery)), first, rtol=0, atol=0)


def test_a_model_that_gives_nan_has_a_loss_of_nan():
    queries = torch.randn(B, D)
    queries[0, 0] = float("nan")
    assert prefix_info_nce(queries, queries, torch.tensor(9.0), DIMENSIONS).isnan().all()


def test_no_tensor_has_a_row_per_query_and_a_column_per_gallery_item(monkeypatch):
    monkeypatch.setattr("modeling_edgeglass.prefix_info_nce._TILE", 16)
    monkeypatch.setattr("modeling_edgeglass.prefix_info_nce._MAX_KEPT_PRODUCTS", 0)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                self.numbers = max(self.numbers, output.numel())
            return output

    images, texts = torch.randn(2, 256, 8)
    with Largest() as largest:
        images.requires_grad_()
        loss = AlignmentLoss(mrl_dimensions=[2, 4], sample_single_mrl_dim=False)
        loss(images, texts, logit_scale=torch.tensor(9.0), caption_ids=torch.arange(256) % 50).loss.backward()
    assert largest.numbers == images.numel()
