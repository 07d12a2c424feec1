"""From a config to the parts of a run."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassModel, EdgeGlassProcessor
from modeling_edgeglass.backbones import max_positions
from training.config import AlignmentConfig
from training.data import PixmoParquetImageTextDataset, build_image_datasets_from_parquet
from training.errors import ConfigError, loading_error
from training.sentence_transformers import write_sentence_transformers_files
from training.transforms import ImageTransform, get_image_transforms

MAX_SHARD_SIZE = "5GB"  # of a file of weights: what is sent again where an upload is cut off


def build_model(config: AlignmentConfig, seed: int) -> EdgeGlassModel:
    """The model that a config describes, with pretrained backbones and new pooling and projections.

    Raises:
        ConfigError: A backbone does not exist or cannot be used, or a value is not possible.
    """
    vision, text, losses = config.vision_encoder, config.text_encoder, config.losses
    try:
        model = EdgeGlassModel.from_vision_text_pretrained(
            vision.model_name,
            text.model_name,
            vision_revision=vision.revision,
            text_revision=text.revision,
            vision_trust_remote_code=vision.trust_remote_code,
            text_trust_remote_code=text.trust_remote_code,
            projection_dim=vision.projection_dim,
            mrl_dimensions=list(vision.mrl_dimensions),
            vision_use_attention_pooling=vision.use_attention_pooling,
            vision_pooling_type=vision.pooling_type,
            vision_feature_layers=list(vision.feature_layers),
            vision_freeze=vision.freeze,
            text_use_attention_pooling=text.use_attention_pooling,
            text_pooling_type=text.pooling_type,
            text_feature_layers=list(text.feature_layers),
            text_freeze=text.freeze,
            contrastive_weight=losses.contrastive,
            mrl_weight=losses.mrl,
            sample_single_mrl_dim=losses.sample_single_mrl_dim,
            mask_equal_captions=losses.mask_equal_captions,
            mrl_seed=seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if config.dataset.cache == "pooled":
        for encoder in (model.vision_encoder, model.text_encoder):
            if encoder.freeze and encoder.pooling is not None:
                encoder.pooling.requires_grad_(False)  # what it pooled is kept
    return model


def frozen_weights(model: EdgeGlassModel) -> dict[str, dict[str, Tensor]]:
    """Those that training leaves as they are, by the config key that names them, for `run_identity`."""
    encoders = {"vision_encoder": model.vision_encoder, "text_encoder": model.text_encoder}
    return {
        f"{name}.model_name": encoder.backbone.state_dict() for name, encoder in encoders.items() if encoder.freeze
    }


def build_processor(config: AlignmentConfig, model: EdgeGlassModel) -> EdgeGlassProcessor:
    """The processor that makes `model`'s inputs.

    Raises:
        ConfigError: A backbone comes without mean and std or without a tokenizer.
    """
    try:
        return EdgeGlassProcessor.from_vision_text_pretrained(
            config.vision_encoder.model_name,
            config.text_encoder.model_name,
            image_size=config.dataset.image_size,
            max_text_length=config.dataset.max_text_length,
            max_positions=max_positions(model.text_encoder.backbone),
            vision_revision=config.vision_encoder.revision,
            text_revision=config.text_encoder.revision,
            vision_trust_remote_code=config.vision_encoder.trust_remote_code,
            text_trust_remote_code=config.text_encoder.trust_remote_code,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_datasets(
    config: AlignmentConfig, processor: EdgeGlassProcessor, seed: int
) -> dict[str, PixmoParquetImageTextDataset]:
    """Train and val set of a config; the test set stays untouched until `training.evaluate`.

    Where one view of a picture is kept for all epochs, training sees the pictures as evaluation does.
    """
    keeps_one_view = config.dataset.cache != "off" and config.vision_encoder.freeze and not config.dataset.cache_views
    return build_image_datasets_from_parquet(
        config.dataset,
        train_parquet_path=config.dataset.train_parquet,
        val_parquet_path=config.dataset.val_parquet,
        train_transforms=image_transforms(processor, is_training=not keeps_one_view),
        val_transforms=image_transforms(processor, is_training=False),
        max_text_length=processor.tokenizer.model_max_length,
        text_dropout_prob=config.dataset.text_dropout_prob,
        seed=seed,
    )


def save_alignment(model: EdgeGlassModel, folder: Path) -> None:
    """Write a model for `from_pretrained` and for sentence-transformers."""
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    write_sentence_transformers_files(folder)


def load_model(name_or_path: str) -> tuple[EdgeGlassModel, EdgeGlassProcessor]:
    """A saved model and its processor, from a directory or the Hub.

    Raises:
        ConfigError: There is none, or it cannot be read, or lacks weights.
    """
    check_place(name_or_path)
    try:
        kind = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type", "unknown")
        if kind != EdgeGlassConfig.model_type:
            raise ValueError(f"its config.json tells of a model of type {kind}, or is not there")
        loaded: Any = EdgeGlassModel.from_pretrained(name_or_path, output_loading_info=True)
        processor = EdgeGlassProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{name_or_path}: no EdgeGlass model: {loading_error(error)}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"{name_or_path}: no whole EdgeGlass model: it lacks {len(missing)} weights, such as {missing[0]}"
        )
    return model, processor


def check_place(name_or_path: str) -> None:
    """Find slips in the name of a directory before the Hub is asked for it.

    Raises:
        ConfigError: It is that of a run, or one beside which there are others is missing.
    """
    path = Path(name_or_path)
    if (path / "model" / "config.json").is_file() and not (path / "config.json").exists():
        raise ConfigError(f"{name_or_path}: is a run's output directory; its model is {path / 'model'}")
    if not path.exists() and path.parent.is_dir() and len(path.parts) > 1:
        raise ConfigError(f"{name_or_path}: there is no such directory in {path.parent}")


def image_transforms(processor: EdgeGlassProcessor, *, is_training: bool) -> ImageTransform:
    """Transforms whose size, mean and std are the processor's."""
    image_processor: Any = processor.image_processor
    return get_image_transforms(
        image_processor.crop_size["height"],
        is_training,
        image_mean=image_processor.image_mean,
        image_std=image_processor.image_std,
        resample=image_processor.resample,
    )
