"""EdgeGlass: any vision and any text backbone in one Matryoshka space, and a language model that reads from it."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_edgeglass import EdgeGlassConfig, EdgeGlassDecodingConfig
from .decoding_edgeglass import EdgeGlassForConditionalGeneration
from .encoders import TextEncoder, VisionEncoder
from .losses import AlignmentLoss
from .matryoshka import truncate_embeds
from .modeling_edgeglass import EdgeGlassModel, EdgeGlassOutput, EdgeGlassPreTrainedModel
from .pooling import AttentionPooling, SimpleAttentionPooling, StatisticsPooling
from .processing_decoding import EdgeGlassDecodingProcessor
from .processing_edgeglass import EdgeGlassProcessor

AutoConfig.register(EdgeGlassConfig.model_type, EdgeGlassConfig)
AutoModel.register(EdgeGlassConfig, EdgeGlassModel)
AutoProcessor.register(EdgeGlassConfig, EdgeGlassProcessor)
AutoConfig.register(EdgeGlassDecodingConfig.model_type, EdgeGlassDecodingConfig)
AutoModelForImageTextToText.register(EdgeGlassDecodingConfig, EdgeGlassForConditionalGeneration)
AutoProcessor.register(EdgeGlassDecodingConfig, EdgeGlassDecodingProcessor)

__all__ = [
    "AlignmentLoss",
    "AttentionPooling",
    "EdgeGlassConfig",
    "EdgeGlassDecodingConfig",
    "EdgeGlassDecodingProcessor",
    "EdgeGlassForConditionalGeneration",
    "EdgeGlassModel",
    "EdgeGlassOutput",
    "EdgeGlassPreTrainedModel",
    "EdgeGlassProcessor",
    "SimpleAttentionPooling",
    "StatisticsPooling",
    "TextEncoder",
    "VisionEncoder",
    "truncate_embeds",
]
