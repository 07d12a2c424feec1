"""EdgeGlass: any vision and any text backbone in one Matryoshka space, and a language model that reads from it."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from .configuration_edgeglass import EdgeGlassConfig, EdgeGlassDecodingConfig
from .decoding_edgeglass import EdgeGlassForConditionalGeneration
from .encoders import TextEncoder, VisionEncoder
from .image_processing_edgeglass import EdgeGlassImageProcessor
from .losses import AlignmentLoss
from .matryoshka import truncate_embeds
from .modeling_edgeglass import EdgeGlassModel, EdgeGlassOutput, EdgeGlassPreTrainedModel
from .pooling import AttentionPooling, SimpleAttentionPooling, StatisticsPooling
from .processing_decoding import EdgeGlassDecodingProcessor
from .processing_edgeglass import EdgeGlassProcessor

AutoConfig.register(EdgeGlassConfig.model_type, EdgeGlassConfig)
AutoModel.register(EdgeGlassConfig, EdgeGlassModel)
AutoModelForZeroShotImageClassification.register(EdgeGlassConfig, EdgeGlassModel)
AutoProcessor.register(EdgeGlassConfig, EdgeGlassProcessor)
AutoImageProcessor.register(
    EdgeGlassConfig, image_processor_classes={"pil": EdgeGlassImageProcessor, "torchvision": EdgeGlassImageProcessor}
)
AutoConfig.register(EdgeGlassDecodingConfig.model_type, EdgeGlassDecodingConfig)
AutoModelForImageTextToText.register(EdgeGlassDecodingConfig, EdgeGlassForConditionalGeneration)
AutoProcessor.register(EdgeGlassDecodingConfig, EdgeGlassDecodingProcessor)

# Saved with their code, so that `trust_remote_code=True` loads them where this package is not installed.
EdgeGlassConfig.register_for_auto_class()
EdgeGlassModel.register_for_auto_class()
EdgeGlassProcessor.register_for_auto_class()
EdgeGlassImageProcessor.register_for_auto_class()
EdgeGlassDecodingConfig.register_for_auto_class()
EdgeGlassForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
EdgeGlassDecodingProcessor.register_for_auto_class()

__all__ = [
    "AlignmentLoss",
    "AttentionPooling",
    "EdgeGlassConfig",
    "EdgeGlassDecodingConfig",
    "EdgeGlassDecodingProcessor",
    "EdgeGlassForConditionalGeneration",
    "EdgeGlassImageProcessor",
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
