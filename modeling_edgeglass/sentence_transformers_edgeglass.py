"""EdgeGlassTransformer: an alignment as a module of sentence-transformers, which alone imports this file."""

from typing import Any

import torch.nn.functional as F
from sentence_transformers.base.modules.transformer import Transformer
from transformers.dynamic_module_utils import custom_object_save

_EMBEDDING = "sentence_embedding"


class _Features(dict[str, Any]):
    """Features whose embedding is scaled to unit length whenever it is set.

    `SentenceTransformer.encode` cuts the embedding behind the last module, with no place left to normalise it: only
    the cut vector itself can be (cut first, then normalise).
    """

    def __setitem__(self, name: str, value: Any) -> None:
        if name == _EMBEDDING:
            if value.shape[-1] == 0:
                raise ValueError("truncate_dim must be 1 or more: nothing is left of the embeddings")
            value = F.normalize(value, dim=-1)
        super().__setitem__(name, value)


class EdgeGlassTransformer(Transformer):
    """Embeds sentences and pictures as unit vectors, with any `truncate_dim`."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """As any Transformer module: `get_text_features` or `get_image_features`, by the modality of the batch."""
        return _Features(super().forward(features, **kwargs))

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """As any Transformer module, with this file."""
        super().save(output_path, *args, **kwargs)
        custom_object_save(self, output_path)
