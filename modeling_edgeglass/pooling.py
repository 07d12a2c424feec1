"""Learned pooling: from the tokens of a backbone (B, N, D) to one vector per sample (B, D)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .matryoshka import at_least_float32

_ROUNDING = 1e-6  # of a float32, relative: eight units in the last place


def clear_padding(tokens: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where `tokens` (B, N, D) are padding, as booleans (B, N), and the tokens with zeros there.

    A backbone may leave anything at a padding token, NaN included, and zero times NaN is NaN.
    """
    if attention_mask is None:
        return torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device), tokens
    padding = attention_mask == 0
    return padding, tokens.masked_fill(padding.unsqueeze(-1), 0.0)


class SimpleAttentionPooling(nn.Module):
    """One layer of attention: a weight for every token, and the weighted mean of the tokens.

    The scores start at zero, so that pooling starts as the mean of the real tokens and every weight has a
    gradient from the first step.

    Args:
        hidden_size: Width D of a token.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.output_size = hidden_size
        self.score = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as the mean."""
        nn.init.zeros_(self.score)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pool `tokens` (B, N, D) into one vector per sample (B, D).

        Args:
            tokens: Token features (B, N, D).
            attention_mask: 1 for a real token, 0 for padding (B, N); None keeps every token.

        Returns:
            Pooled features (B, D); zeros where every token is padding.
        """
        padding, tokens = clear_padding(tokens, attention_mask)
        weights = self._weights(padding, tokens)
        return torch.einsum("bn,bnd->bd", weights.to(tokens.dtype), tokens)

    def attention_weights(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Weight of each of the tokens (B, N, D) in the pooled vector, as float32 (B, N); each row sums to 1."""
        return self._weights(*clear_padding(tokens, attention_mask))

    def _weights(self, padding: Tensor, tokens: Tensor) -> Tensor:
        scores = (tokens @ self.score.to(tokens.dtype)).float()  # (B, N)
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1).masked_fill(padding, 0.0)  # an all-padding row pools to zeros, not NaN


class StatisticsPooling(SimpleAttentionPooling):
    """Mean, standard deviation, maximum and first token side by side, each and together of unit length.

    Attentive statistics pooling (arXiv:1803.10963, eq. 5 and 6): mean and deviation are weighted by a learned
    attention, here of one layer, which starts uniform. The maximum and the token that a tower made to stand for the
    whole add what a mean blurs. A part that is all zeros, as the deviation of a single token, stays zero.

    Args:
        hidden_size: Width D of a token.
        has_first_token: The first real token stands for all (CLS), and is a part of its own.
        layer_sizes: Widths of the layers that a token joins, each of which has parts of its own; None: one layer.

    Attributes:
        output_size: Width of the pooled vector: 3 D, or 4 D with a first token. The mean comes first.
    """

    def __init__(
        self, hidden_size: int, *, has_first_token: bool = False, layer_sizes: Sequence[int] | None = None
    ) -> None:
        super().__init__(hidden_size)
        self.has_first_token = has_first_token
        self.layer_sizes = list(layer_sizes or [hidden_size])
        self.output_size = (4 if has_first_token else 3) * hidden_size

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pool `tokens` (B, N, D) into one vector per sample (B, 3 D or 4 D).

        Args:
            tokens: Token features (B, N, D).
            attention_mask: 1 for a real token, 0 for padding (B, N); None keeps every token.

        Returns:
            Pooled features, of unit length; zeros where every token is padding.
        """
        padding, tokens = clear_padding(tokens, attention_mask)
        with torch.autocast(tokens.device.type, enabled=False):  # a deviation is a small difference
            tokens = at_least_float32(tokens)
            weights = self._weights(padding, tokens).to(tokens.dtype)
            parts = [*_mean_and_deviation(weights, padding, tokens), _maximum(padding, tokens, attention_mask)]
        if self.has_first_token:
            first = (~padding).long().argmax(dim=1)  # padding may stand in front
            parts.append(tokens[torch.arange(tokens.shape[0], device=tokens.device), first])
        pieces = [F.normalize(piece, dim=-1) for part in parts for piece in part.split(self.layer_sizes, dim=-1)]
        return F.normalize(torch.cat(pieces, dim=-1), dim=-1)


def _mean_and_deviation(weights: Tensor, padding: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation (B, D) of tokens (B, N, D) that are zero at padding.

    Around the plain mean, which no gradient needs: squares of what is far from zero would cost the deviation its
    digits, and more copies of the tokens time.
    """
    plain_mean = tokens.detach().sum(dim=1) / (~padding).sum(dim=1, keepdim=True).clamp(min=1)
    centred = tokens - plain_mean.unsqueeze(1)
    shift = torch.einsum("bn,bnd->bd", weights, centred)
    variance = torch.einsum("bn,bnd->bd", weights, centred.square()) - shift.square()
    mean = plain_mean + shift
    # What rounding leaves of constant tokens is none, and the square root has no gradient at zero.
    is_real = variance > _ROUNDING**2 * (variance + mean.square())
    return mean, torch.where(is_real, variance, 1.0).sqrt().masked_fill(~is_real, 0.0)


def _maximum(padding: Tensor, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The largest value of each dimension (B, D); zeros where every token is padding."""
    if attention_mask is None:
        return tokens.amax(dim=1)
    highest = tokens.masked_fill(padding.unsqueeze(-1), torch.finfo(tokens.dtype).min).amax(dim=1)
    return highest.masked_fill(padding.all(dim=1, keepdim=True), 0.0)


class AttentionPooling(nn.Module):
    """Multi-head attention with several learned queries, whose answers are averaged.

    Pooling by multi-head attention of Set Transformer (arXiv:1810.00825, eq. 11), with one linear map per
    query, value and output and no feed-forward part. Values and output start as the identity, so that the
    pooled vector starts as a weighted mean of normalised tokens; queries start at standard deviation 1, where
    the scores differ between tokens. (At 0.02 every token gets the same weight and nearly no gradient.)

    Args:
        hidden_size: Width D of a token.
        num_heads: Attention heads; must divide D.
        num_queries: Learned queries.

    Raises:
        ValueError: `num_heads` does not divide `hidden_size`.
    """

    def __init__(self, hidden_size: int, *, num_heads: int = 8, num_queries: int = 4) -> None:
        super().__init__()
        if hidden_size % num_heads != 0:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}")
        self.output_size = hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the start that the class docstring describes."""
        self.norm.reset_parameters()
        nn.init.normal_(self.queries, std=1.0)
        hidden_size = self.queries.shape[-1]
        query, key, value = self.attention.in_proj_weight.split(hidden_size)
        nn.init.xavier_uniform_(query)
        nn.init.xavier_uniform_(key)
        nn.init.eye_(value)
        nn.init.eye_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.in_proj_bias)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pool `tokens` (B, N, D) into one vector per sample (B, D).

        Args:
            tokens: Token features (B, N, D).
            attention_mask: 1 for a real token, 0 for padding (B, N); None keeps every token.

        Returns:
            Pooled features (B, D); zeros where every token is padding.
        """
        padding, tokens = clear_padding(tokens, attention_mask)
        tokens = self.norm(tokens)
        weights = self._weights(padding, tokens).mean(dim=2)  # (B, N, H): values do not depend on the query
        attention, hidden_size = self.attention, self.queries.shape[-1]
        means = torch.einsum("bnh,bnd->bhd", weights.to(tokens.dtype), tokens)
        of_head = attention.in_proj_weight[2 * hidden_size :].unflatten(0, (attention.num_heads, -1))  # (H, D / H, D)
        values = torch.einsum("bhd,hed->bhe", means, of_head).flatten(1) + attention.in_proj_bias[2 * hidden_size :]
        return attention.out_proj(values).masked_fill(padding.all(dim=1, keepdim=True), 0.0)

    def attention_weights(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Weight of each of the tokens (B, N, D) in the pooled vector, as float32 (B, N); each row sums to 1.

        The mean over heads and queries.
        """
        padding, tokens = clear_padding(tokens, attention_mask)
        return self._weights(padding, self.norm(tokens)).mean(dim=(2, 3))

    def _weights(self, padding: Tensor, tokens: Tensor) -> Tensor:
        """Weights (B, N, Q, H) in float32 of normalised tokens; zeros where all is padding.

        Queries are the same for every sample, so that the map of keys is applied to them instead of to the tokens:
        32 vectors in place of B N. What a key's bias adds is the same for all tokens and no part of a softmax.
        """
        attention, hidden_size = self.attention, self.queries.shape[-1]
        queries = F.linear(
            self.queries, attention.in_proj_weight[:hidden_size], attention.in_proj_bias[:hidden_size]
        ).unflatten(1, (attention.num_heads, -1))  # (Q, H, D / H)
        keys = attention.in_proj_weight[hidden_size : 2 * hidden_size].unflatten(0, (attention.num_heads, -1))
        asked = torch.einsum("qhe,hed->qhd", queries, keys) / queries.shape[-1] ** 0.5
        scores = torch.einsum("bnd,qhd->bnqh", tokens, asked).float()
        padding = padding[:, :, None, None]
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=1).masked_fill(padding, 0.0)


def masked_mean(tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Mean of the real tokens of `tokens` (B, N, D) as (B, D); zeros where every token is padding."""
    padding, tokens = clear_padding(tokens, attention_mask)
    return tokens.sum(dim=1) / (~padding).sum(dim=1, keepdim=True).clamp(min=1)


def build_pooling(pooling_type: str, *layer_sizes: int, has_first_token: bool = False) -> nn.Module:
    """The pooling layer called `pooling_type`; its `output_size` is what it gives.

    Args:
        pooling_type: `"simple"`, `"multihead"` or `"statistics"`.
        layer_sizes: Widths of the layers that a token joins; their sum is its width D.
        has_first_token: The first token stands for all, as a CLS token does.

    Raises:
        ValueError: There is no pooling of that name.
    """
    hidden_size = sum(layer_sizes)
    if pooling_type == "simple":
        return SimpleAttentionPooling(hidden_size)
    if pooling_type == "multihead":
        return AttentionPooling(hidden_size)
    if pooling_type == "statistics":
        return StatisticsPooling(hidden_size, has_first_token=has_first_token, layer_sizes=layer_sizes)
    raise ValueError(f"pooling_type must be simple, multihead or statistics, got {pooling_type!r}")
