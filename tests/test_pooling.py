import pytest
import torch
import torch.nn.functional as F

from modeling_edgeglass.pooling import (
    AttentionPooling,
    SimpleAttentionPooling,
    StatisticsPooling,
    build_pooling,
    masked_mean,
)

B, N, D = 3, 7, 16


@pytest.fixture(params=["simple", "multihead", "mean", "statistics"])
def pooling(request: pytest.FixtureRequest):
    """Each pooling away from its start, so that attention is not uniform."""
    if request.param == "mean":
        return masked_mean
    torch.manual_seed(0)
    layer = build_pooling(request.param, D)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def test_padding_changes_nothing(pooling):
    tokens = torch.randn(B, N, D)
    padded = torch.cat([torch.full((B, 2, D), float("nan")), tokens, torch.full((B, 4, D), float("inf"))], dim=1)
    mask = torch.cat([torch.zeros(B, 2), torch.ones(B, N), torch.zeros(B, 4)], dim=1)
    torch.testing.assert_close(pooling(padded, mask), pooling(tokens, None))


def test_order_of_tokens_changes_nothing(pooling):
    tokens = torch.randn(B, N, D)
    torch.testing.assert_close(pooling(tokens.flip(1), None), pooling(tokens, None))


def test_an_all_padding_row_is_zeros_and_leaves_the_others_alone(pooling):
    tokens = torch.randn(B, N, D, requires_grad=True)
    mask = torch.ones(B, N)
    mask[1] = 0
    pooled = pooling(tokens, mask)
    assert torch.equal(pooled[1], torch.zeros(pooled.shape[1]))
    torch.testing.assert_close(pooled[[0, 2]], pooling(tokens, None)[[0, 2]])
    pooled.square().sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()


def test_a_batch_of_one_and_a_single_token_keep_their_axes(pooling):
    assert pooling(torch.randn(1, 1, D), None).shape == (1, getattr(pooling, "output_size", D))


def test_simple_pooling_is_softmax_of_one_score_per_token():
    pooling = SimpleAttentionPooling(D)
    torch.nn.init.normal_(pooling.score)
    tokens = torch.randn(B, N, D)
    expected = torch.stack([torch.softmax(row @ pooling.score, dim=0) @ row for row in tokens])
    torch.testing.assert_close(pooling(tokens), expected)


def test_simple_pooling_starts_as_the_masked_mean():
    tokens, mask = torch.randn(B, N, D), torch.arange(N) < torch.tensor([[7], [3], [1]])
    torch.testing.assert_close(SimpleAttentionPooling(D)(tokens, mask), masked_mean(tokens, mask))


def test_multihead_pooling_starts_as_an_average_of_normalised_tokens_that_depends_on_the_token():
    torch.manual_seed(0)
    pooling = AttentionPooling(D, num_heads=4, num_queries=2)
    token = torch.randn(1, 1, D)
    torch.testing.assert_close(pooling(token.expand(1, N, D)), pooling.norm(token)[:, 0])
    tokens = torch.randn(B, N, D)
    assert (pooling(tokens) - pooling.norm(tokens).mean(dim=1)).abs().max() > 0.05


def test_multihead_pooling_is_multi_head_attention_averaged_over_its_queries():
    """Its keys and values are never computed; torch's own layer, with the same weights, computes them all."""
    pooling = AttentionPooling(D, num_heads=4, num_queries=3)
    for weight in pooling.parameters():
        torch.nn.init.normal_(weight)
    tokens, mask = torch.randn(B, N, D), torch.ones(B, N)
    mask[1, 2:] = 0
    normalised, queries = pooling.norm(tokens), pooling.queries.expand(B, -1, -1)
    options = {"key_padding_mask": mask == 0, "average_attn_weights": False}
    answers, weights = pooling.attention(queries, normalised, normalised, **options)
    torch.testing.assert_close(pooling(tokens, mask), answers.mean(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooling.attention_weights(tokens, mask), weights.mean(dim=(1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling_type", ["simple", "multihead", "statistics"])
def test_every_weight_has_a_gradient_at_the_first_step(pooling_type: str):
    torch.manual_seed(0)
    pooling = build_pooling(pooling_type, D)
    (pooling(torch.randn(B, N, D)) * torch.randn(B, pooling.output_size)).sum().backward()
    for name, parameter in pooling.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if name == "attention.in_proj_bias":  # a bias of the keys cannot change a softmax
            gradient = torch.cat([gradient[:D], gradient[2 * D :]])
        assert gradient.norm() > 1e-4, name


def naive_statistics(row: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of the tokens (N, D) of one sample, in float64."""
    row, weights = row.double(), weights.double().unsqueeze(1)
    mean = (weights * row).sum(dim=0)
    deviation = ((weights * row**2).sum(dim=0) - mean**2).sqrt()
    parts = [part / part.norm() for part in (mean, deviation, row.max(dim=0).values, row[0])]
    return torch.cat(parts) / 2


def test_statistics_are_those_of_a_naive_version():
    torch.manual_seed(0)
    pooling = StatisticsPooling(D, has_first_token=True)
    tokens = 3 + torch.randn(B, N, D)
    expected = torch.stack([naive_statistics(row, torch.full((N,), 1 / N)) for row in tokens])
    torch.testing.assert_close(pooling(tokens).double(), expected, atol=1e-5, rtol=1e-4)
    torch.nn.init.normal_(pooling.score)
    weights = (tokens @ pooling.score).softmax(dim=1)
    expected = torch.stack([naive_statistics(*each) for each in zip(tokens, weights, strict=True)])
    torch.testing.assert_close(pooling(tokens).double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 5])
def test_constant_tokens_have_no_deviation_and_finite_gradients(count: int, dtype: torch.dtype):
    pooling = StatisticsPooling(D, has_first_token=True)
    tokens = (100 * torch.randn(B, 1, D).to(dtype)).repeat(1, count, 1).requires_grad_()
    mean, deviation, highest, first = pooling(tokens).split(D, dim=1)
    assert torch.equal(deviation, torch.zeros(B, D))
    torch.testing.assert_close(mean.norm(dim=1), torch.full((B,), 3**-0.5))
    torch.testing.assert_close(mean, highest)
    torch.testing.assert_close(mean, first)
    (pooling(tokens) * torch.randn(B, 4 * D)).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.isfinite().all()
    assert pooling.score.grad is not None
    assert pooling.score.grad.isfinite().all()


def test_the_first_token_is_the_first_that_is_no_padding():
    tokens, mask = torch.randn(B, N, D), torch.ones(B, N)
    mask[1, :3] = 0
    *_, first = StatisticsPooling(D, has_first_token=True)(tokens, mask).split(D, dim=1)
    torch.testing.assert_close(2 * first, F.normalize(torch.stack([tokens[0, 0], tokens[1, 3], tokens[2, 0]]), dim=1))


def test_pairs_that_only_attention_can_tell_apart_are_learned_in_ten_steps():
    """The tokens of every sample have the same mean, and the projection is frozen.

    Over ten seeds the loss ends in 0.38..0.58; with queries that start at zero or at std 0.02, in 0.89..1.53.
    """
    torch.manual_seed(0)
    half = torch.randn(32, 3, 32)
    tokens, targets = torch.cat([half, -half], dim=1), F.normalize(torch.randn(32, 64), dim=-1)
    pooling, projection = AttentionPooling(32), torch.nn.Linear(32, 64, bias=False).requires_grad_(False)

    def loss(pooled: torch.Tensor) -> torch.Tensor:
        embeds = F.normalize(projection(pooled), dim=-1)
        return F.cross_entropy(10 * embeds @ targets.T, torch.arange(32))

    optimizer = torch.optim.AdamW(pooling.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        loss(pooling(tokens)).backward()
        optimizer.step()
    assert loss(pooling(tokens)) < 0.7
    assert masked_mean(tokens).abs().max() < 1e-6


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="hidden_size 30 is not divisible by num_heads 8"):
        AttentionPooling(30)


def test_unknown_pooling_names_those_there_are():
    with pytest.raises(ValueError, match="simple, multihead or statistics, got 'max'"):
        build_pooling("max", D)
