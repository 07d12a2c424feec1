"""From a decoding config to the parts of a run."""

from typing import Any

from omegaconf import OmegaConf
from transformers import TrainingArguments

from modeling_edgeglass import EdgeGlassDecodingProcessor, EdgeGlassForConditionalGeneration
from training.arguments import build_arguments
from training.build import image_transforms
from training.config_files import key_error
from training.decoding.config import DecodingConfig
from training.decoding.data import AnswersDataset, build_answers_datasets
from training.errors import ConfigError


def build_decoding_arguments(config: DecodingConfig, sizes: list[int]) -> TrainingArguments:
    """Arguments of a decoding run; see `build_arguments`.

    Args:
        config: The run's.
        sizes: Of an embedding that are trained, the full one first.
    """
    if config.trainer.get("label_smoothing_factor"):
        reason = "labels cannot be smoothed behind a prefix that has none; leave it out"
        raise key_error(config, "trainer.label_smoothing_factor", reason)
    metrics = ["loss", "bad_rows", "perplexity", *(f"perplexity@{size}" for size in sizes[1:])]
    return build_arguments(config, {"eval_on_start": True, "ddp_find_unused_parameters": False}, metrics)


def build_decoder(config: DecodingConfig, seed: int) -> EdgeGlassForConditionalGeneration:
    """The model that a config describes: a trained alignment, a language model and a new bridge.

    Raises:
        ConfigError: One of the two cannot be loaded, or a value is not possible.
    """
    bridge = config.decoding
    targets: Any = bridge.lora_target_modules
    try:
        return EdgeGlassForConditionalGeneration.from_alignment_pretrained(
            bridge.alignment,
            bridge.language_model,
            alignment_revision=bridge.alignment_revision,
            language_revision=bridge.language_revision,
            language_trust_remote_code=bridge.language_trust_remote_code,
            load_in_4bit=bridge.load_in_4bit,
            dtype="float32" if bridge.language_training == "full" else "auto",  # what trains has to add small numbers
            num_prefix_tokens=bridge.num_prefix_tokens,
            language_training=bridge.language_training,
            lora_rank=bridge.lora_rank,
            lora_alpha=bridge.lora_alpha,
            lora_target_modules=list(targets) if OmegaConf.is_list(targets) else targets,
            decoding_seed=seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_decoding_processor(
    config: DecodingConfig, model: EdgeGlassForConditionalGeneration
) -> EdgeGlassDecodingProcessor:
    """The processor that makes `model`'s inputs.

    Raises:
        ConfigError: The alignment has no processor or the language model no tokenizer, or prefix, prompt and answer
            are more tokens than the language model has positions for.
    """
    bridge = config.decoding
    try:
        processor = EdgeGlassDecodingProcessor.from_alignment_pretrained(
            bridge.alignment,
            bridge.language_model,
            alignment_revision=bridge.alignment_revision,
            language_revision=bridge.language_revision,
            language_trust_remote_code=bridge.language_trust_remote_code,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    limit, taken = model.config.max_text_tokens, len(processor.prompt_ids(config.dataset.prompt))
    if limit is not None and taken + config.dataset.max_text_length > limit:
        raise key_error(
            config,
            "dataset.max_text_length",
            f"the prompt takes {taken} tokens of the {limit} that the language model has positions for behind the "
            f"prefix: {max(0, limit - taken)} are left for an answer",
        )
    return processor


def build_decoding_datasets(
    config: DecodingConfig, processor: EdgeGlassDecodingProcessor, seed: int
) -> dict[str, AnswersDataset]:
    """Train and val set of a config; where one view of a picture is kept, training sees it as evaluation does."""
    keeps_one_view = config.dataset.cache != "off" and not config.dataset.cache_views
    pictures = processor.alignment_processor
    return build_answers_datasets(
        config,
        train_transforms=image_transforms(pictures, is_training=not keeps_one_view),
        val_transforms=image_transforms(pictures, is_training=False),
        seed=seed,
    )
