"""Finding and loading backbones: any transformers model that turns pictures or text into tokens.

A composite checkpoint (CLIP, SigLIP) is a vision and a text backbone in one; either half can be taken.
"""

import importlib
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

Modality = Literal["vision", "text"]

SUPPORTED_BACKBONES = {
    "vision": "a vision model that returns last_hidden_state as tokens (batch, tokens, width) or as a feature map "
    "(batch, channels, height, width): CLIP, SigLIP, DINOv2, ViT, ConvNeXt, ResNet, EfficientNet and their kin",
    "text": "a text model that returns last_hidden_state (batch, tokens, width): BERT, MPNet, RoBERTa, ModernBERT, "
    "CLIP text, T5 encoder, Qwen3 and their kin",
}

_MAIN_INPUT = {"vision": "pixel_values", "text": "input_ids"}

# What vision models call the embedding of a token that stands for the picture.
_FIRST_TOKENS = ("cls_token", "class_token", "class_embedding")

# What configs call the width of last_hidden_state: most models, staged convolutional ones, EfficientNet.
_WIDTH_KEYS = ("hidden_size", "hidden_sizes", "hidden_dim")


def load_backbone(
    modality: Modality,
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a pretrained backbone, the fitting half where the checkpoint is a composite.

    Args:
        modality: `"vision"` or `"text"`.
        name_or_path: Model id on the Hub, or a directory that `save_pretrained` wrote.
        revision: Commit, tag or branch on the Hub.
        trust_remote_code: Run model code that comes with the checkpoint.
        **kwargs: Handed to `from_pretrained`; `dtype` is float32 unless given.

    Raises:
        ValueError: There is no such model, it is none that we can use, or its checkpoint lacks weights.
    """
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = backbone_config(AutoConfig.from_pretrained(name_or_path, **hub), modality)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{modality} tower {name_or_path!r} is neither a model directory here nor one on the Hub: {reason}"
        ) from error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the other half of a composite is no news; what is missing is looked at below
    try:
        backbone, report = _backbone_class(config, modality).from_pretrained(
            name_or_path,
            config=_without_cache(config),
            output_loading_info=True,
            **hub,
            **({"dtype": "float32"} | kwargs),
        )
    finally:
        logging.set_verbosity(verbosity)
    if backbone.main_input_name != _MAIN_INPUT[modality]:
        raise ValueError(f"{type(backbone).__name__} is no {modality} tower; use {SUPPORTED_BACKBONES[modality]}")
    # Checkpoints without a pooler are common, and its output is used on request alone.
    missing = [key for key in sorted(report["missing_keys"]) if "pooler" not in key]
    if missing:
        raise ValueError(
            f"{modality} tower {name_or_path!r}: the checkpoint lacks {len(missing)} weights of "
            f"{type(backbone).__name__}, such as {missing[0]}; use {SUPPORTED_BACKBONES[modality]}"
        )
    return backbone


def build_backbone(modality: Modality, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """A backbone with random weights, as its config describes."""
    return _backbone_class(config, modality)._from_config(_without_cache(config), **kwargs)


def backbone_config(config: PreTrainedConfig, modality: Modality) -> PreTrainedConfig:
    """The config of the backbone for `modality`: of one half where `config` is a composite, else itself."""
    key = f"{modality}_config"
    return getattr(config, key) if key in config.sub_configs else config


def _without_cache(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config`, set so that a causal model keeps no keys and values: an encoder never reads them."""
    if getattr(config, "use_cache", False):
        config.use_cache = False
    return config


def _backbone_class(config: PreTrainedConfig, modality: Modality) -> Any:
    """The model class for `config`, always the encoder alone."""
    auto_classes = [AutoModelForTextEncoding, AutoModel] if modality == "text" else [AutoModel]
    for auto_class in auto_classes:
        mapping: Any = auto_class._model_mapping
        if type(config) in mapping:
            return mapping[type(config)]
    # Halves such as SiglipTextModel are in no auto mapping; transformers names them after their configs.
    modeling = type(config).__module__.replace(".configuration_", ".modeling_")
    name = type(config).__name__.removesuffix("Config") + "Model"
    backbone_class = getattr(importlib.import_module(modeling), name, None)
    if backbone_class is None:
        raise ValueError(f"{type(config).__name__} is no {modality} tower; use {SUPPORTED_BACKBONES[modality]}")
    return backbone_class


def hidden_size(config: PreTrainedConfig) -> int:
    """Width D of the tokens that a backbone of this config returns.

    Raises:
        ValueError: The config does not tell.
    """
    for key in _WIDTH_KEYS:
        if key in config.to_dict() or key in config.attribute_map:
            width = getattr(config, key)
            return int(width[-1] if isinstance(width, list | tuple) else width)
    supported = "; or ".join(SUPPORTED_BACKBONES.values())
    raise ValueError(
        f"{type(config).__name__} tells no token width: none of {', '.join(_WIDTH_KEYS)}; use {supported}"
    )


def has_first_token(backbone: PreTrainedModel) -> bool:
    """Whether the first token stands for the whole picture or text, as CLS does; read from architecture alone."""
    if backbone.main_input_name == _MAIN_INPUT["vision"]:
        return any(name.endswith(_FIRST_TOKENS) for name, _ in backbone.named_parameters())
    # Models that are trained to fill masks begin every text with such a token.
    return backbone.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def max_positions(backbone: PreTrainedModel) -> int | None:
    """Tokens that a text backbone has positions for; None where it has no limit, as with relative positions."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith(("position_embedding", "position_embeddings", "wpe")):
            # RoBERTa and its kin count positions from padding_idx + 1.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return None


def longest_text(config: PreTrainedConfig) -> int | None:
    """`max_positions` of the text backbone that `config` describes; of rotary positions, what its config allows."""
    with torch.device("meta"):  # takes no memory
        positions = max_positions(build_backbone("text", config))
    return positions or config.to_dict().get("max_position_embeddings")
