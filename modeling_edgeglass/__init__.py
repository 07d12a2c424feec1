"""EdgeGlass: any vision and any text backbone in one Matryoshka space."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_edgeglass import EdgeGlassConfig
from .encoders import TextEncoder, VisionEncoder
from .losses import AlignmentLoss
from .matryoshka import truncate_embeds
from .modeling_edgeglass import EdgeGlassModel, EdgeGlassOutput, EdgeGlassPreTrainedModel
from .pooling import AttentionPooling, SimpleAttentionPooling
from .processing_edgeglass import EdgeGlassProcessor

AutoConfig.register(EdgeGlassConfig.model_type, EdgeGlassConfig)
AutoModel.register(EdgeGlassConfig, EdgeGlassModel)
AutoProcessor.register(EdgeGlassConfig, EdgeGlassProcessor)

__all__ = [
    "AlignmentLoss",
    "AttentionPooling",
    "EdgeGlassConfig",
    "EdgeGlassModel",
    "EdgeGlassOutput",
    "EdgeGlassPreTrainedModel",
    "EdgeGlassProcessor",
    "SimpleAttentionPooling",
    "TextEncoder",
    "VisionEncoder",
    "truncate_embeds",
]
