import pytest
import torch
import torch.nn.functional as F

from modeling_edgeglass import truncate_embeds


def test_prefixes_are_cut_first_and_then_normalised():
    embeds = F.normalize(torch.randn(5, 16), dim=-1)
    torch.testing.assert_close(truncate_embeds(embeds, 4), embeds[:, :4] / embeds[:, :4].norm(dim=-1, keepdim=True))


def test_cutting_twice_is_cutting_once():
    embeds = torch.randn(5, 16)
    torch.testing.assert_close(truncate_embeds(truncate_embeds(embeds, 8), 4), truncate_embeds(embeds, 4))


def test_length_does_not_matter():
    embeds = torch.randn(5, 16)
    torch.testing.assert_close(truncate_embeds(1000 * embeds, 8), truncate_embeds(embeds, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_unit_length_whatever_the_precision(dtype: torch.dtype, scale: float):
    norms = truncate_embeds((torch.ones(2, 4096) * scale).to(dtype), None).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


@pytest.mark.parametrize("truncate_dim", [0, -1, 17, 2.5, 8.0, "8", True])
def test_impossible_size_is_an_error_that_names_the_range(truncate_dim):
    with pytest.raises(ValueError, match=rf"^truncate_dim must be in 1\.\.16, got {truncate_dim!r}$"):
        truncate_embeds(torch.randn(2, 16), truncate_dim)
