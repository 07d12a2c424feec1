"""Bridge: from an embedding to soft tokens of a language model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bridge(nn.Module):
    """Soft tokens of an embedding: LayerNorm, then two linear layers with GELU between.

    The mapping network of ClipCap (arXiv:2111.09734) with the layers of LLaVA-1.5 (arXiv:2310.03744).

    Args:
        embed_dim: Size D of an embedding.
        hidden_size: Width H of the language model's tokens.
        num_prefix_tokens: Soft tokens P.
    """

    token_scale: Tensor

    def __init__(self, embed_dim: int, hidden_size: int, num_prefix_tokens: int) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = nn.LayerNorm(embed_dim)
        self.up = nn.Linear(embed_dim, hidden_size)
        self.down = nn.Linear(hidden_size, num_prefix_tokens * hidden_size)
        self.register_buffer("token_scale", torch.ones(()))

    def forward(self, embeds: Tensor) -> Tensor:
        """Embeddings (B, D) to soft tokens (B, P, H), as long as the language model's own to begin with."""
        tokens = self.down(F.gelu(self.up(self.norm(embeds.to(self.norm.weight.dtype)))))
        return tokens.unflatten(1, (self.num_prefix_tokens, -1)) * self.token_scale
