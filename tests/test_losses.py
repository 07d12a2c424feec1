import math
import re

import pytest
import torch
import torch.nn.functional as F

from modeling_edgeglass import AlignmentLoss, truncate_embeds

SCALE = torch.tensor(10.0)


def pairs(num_pairs: int = 6, dim: int = 16, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num_pairs, dim, generator=generator, dtype=dtype)
    texts = images + torch.randn(num_pairs, dim, generator=generator, dtype=dtype)
    return images.requires_grad_(), texts.requires_grad_()


def naive_clip(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, masked=lambda i, j: False):
    """Symmetric InfoNCE pair by pair, as the CLIP paper's figure 3 says it in words."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    total = torch.zeros((), dtype=images.dtype)
    for queries, gallery in ((images, texts), (texts, images)):
        for i in range(len(queries)):
            logits = [scale * queries[i] @ gallery[j] for j in range(len(gallery)) if not masked(i, j)]
            total = total + torch.logsumexp(torch.stack(logits), 0) - scale * queries[i] @ gallery[i]
    return total / (2 * len(images))


def test_indistinguishable_pairs_cost_log_batch_size_at_every_size():
    embeds = torch.ones(8, 4)
    loss = AlignmentLoss(0.25, 1.0, mrl_dimensions=[2])(embeds, embeds, logit_scale=SCALE)
    torch.testing.assert_close(loss.loss_clip, torch.tensor(math.log(8)))
    torch.testing.assert_close(loss.loss_mrl, torch.tensor(math.log(8)))
    torch.testing.assert_close(loss.loss, torch.tensor(1.25 * math.log(8)))


def test_loss_and_gradients_are_those_of_the_naive_loop():
    images, texts = pairs()
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    caption_ids = torch.tensor([1, 2, 1, 3, 2, 1])
    loss = AlignmentLoss(0.25, 1.0, (8, 4, 2), sample_single_mrl_dim=False)
    output = loss(images, texts, logit_scale=scale, caption_ids=caption_ids)

    def masked(i: int, j: int) -> bool:
        return i != j and bool(caption_ids[i] == caption_ids[j])

    clip = naive_clip(images, texts, scale, masked)
    mrl = torch.stack([naive_clip(images[:, :d], texts[:, :d], scale, masked) for d in (8, 4, 2)]).mean()
    torch.testing.assert_close(output.loss_clip, clip)
    torch.testing.assert_close(output.loss_mrl, mrl)
    torch.testing.assert_close(output.loss, 0.25 * clip + mrl)
    inputs = (images, texts, scale)
    torch.testing.assert_close(
        torch.autograd.grad(output.loss, inputs), torch.autograd.grad(0.25 * clip + mrl, inputs)
    )


def test_the_sampled_size_is_an_unbiased_estimate_of_the_mean():
    images, texts = pairs()
    sampled, mean = AlignmentLoss(mrl_dimensions=(8, 4, 2)), AlignmentLoss(mrl_dimensions=(8, 4, 2)).eval()
    by_size = {}
    for step in range(50):
        output = sampled(images, texts, logit_scale=SCALE, step=step)
        by_size[output.mrl_dimension] = output.loss_mrl
    assert sorted(by_size) == [2, 4, 8]
    in_eval = mean(images, texts, logit_scale=SCALE)
    assert in_eval.mrl_dimension is None
    torch.testing.assert_close(torch.stack(list(by_size.values())).mean(), in_eval.loss_mrl)


def test_the_size_is_a_function_of_seed_and_step():
    def sizes(seed: int, steps: range) -> list[int | None]:
        loss = AlignmentLoss(mrl_dimensions=(8, 4, 2), seed=seed)
        return [loss(*pairs(2), logit_scale=SCALE, step=step).mrl_dimension for step in steps]

    assert sizes(0, range(20))[10:] == sizes(0, range(10, 20))
    assert sizes(0, range(20)) != sizes(1, range(20))
    shares = [sizes(0, range(600)).count(size) / 600 for size in (8, 4, 2)]
    assert all(abs(share - 1 / 3) < 0.06 for share in shares)  # three standard errors


def test_without_a_step_training_calls_are_counted_and_evaluation_is_not():
    counted, given = AlignmentLoss(mrl_dimensions=(8, 4, 2)), AlignmentLoss(mrl_dimensions=(8, 4, 2))
    for step in range(8):
        counted.eval()(*pairs(), logit_scale=SCALE)
        size = counted.train()(*pairs(), logit_scale=SCALE).mrl_dimension
        assert size == given(*pairs(), logit_scale=SCALE, step=step).mrl_dimension


def test_without_matryoshka_sizes_the_loss_is_clip_alone():
    output = AlignmentLoss(0.5, 1.0, ())(*pairs(), logit_scale=SCALE)
    assert output.loss_mrl == 0
    torch.testing.assert_close(output.loss, 0.5 * output.loss_clip)


def test_an_equal_caption_is_no_negative_and_dropped_captions_cost_nothing():
    images, texts = pairs()
    equal = torch.zeros(6, dtype=torch.long)
    assert AlignmentLoss(mrl_dimensions=[8])(images, texts, logit_scale=SCALE, caption_ids=equal).loss == 0
    unmasked = AlignmentLoss(mrl_dimensions=[8], mask_equal_captions=False)
    torch.testing.assert_close(
        unmasked(images, texts, logit_scale=SCALE, caption_ids=equal).loss,
        unmasked(images, texts, logit_scale=SCALE).loss,
    )


def test_only_directions_count_and_the_two_sides_are_alike():
    images, texts = pairs()
    loss = AlignmentLoss(mrl_dimensions=[8])
    reference = loss(images, texts, logit_scale=SCALE).loss
    torch.testing.assert_close(loss(images * 3, texts * 0.1, logit_scale=SCALE).loss, reference)
    torch.testing.assert_close(loss(texts, images, logit_scale=SCALE).loss, reference)
    order = torch.randperm(6)
    torch.testing.assert_close(loss(images[order], texts[order], logit_scale=SCALE).loss, reference)


def test_half_precision_and_autocast_lose_nothing_inside():
    images, texts = (embeds.detach().bfloat16() for embeds in pairs(dtype=torch.float32))
    loss = AlignmentLoss(mrl_dimensions=[8])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss(images, texts, logit_scale=torch.tensor(90.0, dtype=torch.bfloat16))
    assert output.loss.dtype == torch.float32
    reference = loss(images.float(), texts.float(), logit_scale=torch.tensor(90.0))
    torch.testing.assert_close(output.loss, reference.loss)


def test_gradients_reach_half_precision_embeddings_under_autocast():
    images, texts = (embeds.detach().bfloat16().requires_grad_() for embeds in pairs())
    loss = AlignmentLoss(mrl_dimensions=[8, 4], sample_single_mrl_dim=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = loss(images, texts, logit_scale=SCALE)
        gradients = torch.autograd.grad(output.loss, (images, texts))  # inside, as nobody should
    assert output.loss.dtype == torch.float32
    widened = [embeds.detach().float().requires_grad_() for embeds in (images, texts)]
    expected = torch.autograd.grad(loss(*widened, logit_scale=SCALE).loss, widened)
    torch.testing.assert_close(gradients, tuple(gradient.bfloat16() for gradient in expected))


def test_sizes_may_come_in_any_order_twice_and_be_the_full_one():
    images, texts = pairs()
    sizes = (4, 16, 2, 4)
    output = AlignmentLoss(mrl_dimensions=sizes, sample_single_mrl_dim=False)(images, texts, logit_scale=SCALE)
    naive = {size: naive_clip(images[:, :size], texts[:, :size], SCALE) for size in (2, 4, 16)}
    torch.testing.assert_close(output.loss_clip, naive[16])
    torch.testing.assert_close(output.loss_mrl, torch.stack([naive[size] for size in sizes]).mean())


def test_sides_that_are_not_pairs_are_an_error():
    images, texts = pairs()
    with pytest.raises(ValueError, match=re.escape("the same shape, got (6, 16) and (1, 16)")):
        AlignmentLoss(mrl_dimensions=[8])(images, texts[:1], logit_scale=SCALE)


def test_a_prefix_beyond_the_embedding_is_an_error():
    with pytest.raises(ValueError, match=r"truncate_dim must be in 1\.\.16, got 32"):
        AlignmentLoss(mrl_dimensions=[32])(*pairs(), logit_scale=SCALE)


def test_a_single_pair_is_an_error_that_says_why():
    with pytest.raises(ValueError, match=re.escape("needs two pairs or more in a batch, got one")):
        AlignmentLoss(mrl_dimensions=[8])(*pairs(1), logit_scale=SCALE)


def test_loss_takes_prefixes_as_everyone_else_does():
    images, texts = pairs()
    loss = AlignmentLoss(0.0, 1.0, [4])(images, texts, logit_scale=SCALE)
    prefixes = truncate_embeds(images, 4), truncate_embeds(texts, 4)
    torch.testing.assert_close(loss.loss, AlignmentLoss(1.0, 0.0, ())(*prefixes, logit_scale=SCALE).loss)
