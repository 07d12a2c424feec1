"""From a decoding config to the parts of a run."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, TrainingArguments

from modeling_edgeglass import (
    EdgeGlassConfig,
    EdgeGlassDecodingConfig,
    EdgeGlassDecodingProcessor,
    EdgeGlassForConditionalGeneration,
)
from modeling_edgeglass.decoding_edgeglass import bridge_file
from training.arguments import build_arguments
from training.build import MAX_SHARD_SIZE, check_place, image_transforms
from training.config_files import key_error
from training.decoding.config import DecodingConfig
from training.decoding.data import AnswersDataset, build_answers_datasets
from training.errors import ConfigError, loading_error


def build_decoding_arguments(config: DecodingConfig) -> TrainingArguments:
    """Arguments of a decoding run; see `build_arguments`.

    Raises:
        ConfigError: As there; or the alignment is none.
    """
    if config.trainer.get("label_smoothing_factor"):
        reason = "labels cannot be smoothed behind a prefix that has none; leave it out"
        raise key_error(config, "trainer.label_smoothing_factor", reason)
    metrics = ["loss", "bad_rows", "perplexity", *(f"perplexity@{size}" for size in _smaller_sizes(config))]
    return build_arguments(config, {"eval_on_start": True, "ddp_find_unused_parameters": False}, metrics)


def _smaller_sizes(config: DecodingConfig) -> list[int]:
    """Matryoshka sizes of the alignment, from its config alone: a language model takes its time to load."""
    name = config.decoding.alignment
    try:
        found, _ = PreTrainedConfig.get_config_dict(name, revision=config.decoding.alignment_revision or "main")
        if found.get("model_type") != EdgeGlassConfig.model_type:
            raise ValueError(f"its config.json tells of a model of type {found.get('model_type')}, or is not there")
        return list(EdgeGlassConfig.from_dict(found).mrl_dimensions)
    except (OSError, ValueError, TypeError) as error:
        reason = f"{name!r} is no alignment: {str(error).strip().splitlines()[0]}; run_alignment.py makes one"
        raise key_error(config, "decoding.alignment", reason) from error


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


def check_ends_can_be_pushed(config: DecodingConfig, model: EdgeGlassForConditionalGeneration) -> None:
    """Find out before training whether others could load the bridge that is to be pushed.

    Raises:
        ConfigError: One of its ends is a directory of this machine.
    """
    if not config.trainer.get("push_to_hub") or config.decoding.language_training == "full":
        return
    for end, key in (("alignment", "alignment"), ("language", "language_model")):
        if getattr(model.config, f"{end}_revision") is None:
            raise key_error(
                config,
                "trainer.push_to_hub",
                f"decoding.{key} is a directory of this machine, which nobody else has: push that first and train "
                f"with its id, or push the finished run with `python -m training.push --{key} user/name`",
            )


def frozen_decoder_weights(model: EdgeGlassForConditionalGeneration) -> dict[str, dict[str, Tensor]]:
    """Those that training leaves as they are, by the config key that names them, for `run_identity`."""
    trained = model.trained_state_dict().keys()
    parts = {"decoding.alignment": "alignment", "decoding.language_model": "language_model"}
    weights = {
        key: {
            name: value
            for name, value in model.get_submodule(part).state_dict().items()
            if f"{part}.{name}" not in trained
        }
        for key, part in parts.items()
    }
    return {key: state for key, state in weights.items() if state}


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
            prompt=config.dataset.prompt,
            max_text_length=config.dataset.max_text_length,
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


def save_decoder(model: EdgeGlassForConditionalGeneration, folder: Path) -> None:
    """Write what training changed; of a language model that trained as a whole all, else the bridge and adapters."""
    if model.config.language_training == "full":
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    else:
        model.save_bridge_only(folder)


def load_decoder(
    name_or_path: str, **loading: Any
) -> tuple[EdgeGlassForConditionalGeneration, EdgeGlassDecodingProcessor]:
    """A saved decoder, whole or the bridge alone, and its processor.

    Args:
        name_or_path: Directory, or id on the Hub.
        **loading: Of a bridge alone: as for `from_bridge_pretrained`.

    Raises:
        ConfigError: There is none, or it or one of its parts cannot be read.
    """
    check_place(name_or_path)
    try:
        kind = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type", "unknown")
        if kind != EdgeGlassDecodingConfig.model_type:
            raise ValueError(f"its config.json tells of a model of type {kind}, or is not there")
        processor: Any = EdgeGlassDecodingProcessor.from_pretrained(name_or_path)
        if bridge_file(name_or_path) is not None:
            model: Any = EdgeGlassForConditionalGeneration.from_bridge_pretrained(name_or_path, **loading)
        elif given := [name for name, value in loading.items() if value]:
            raise ValueError(f"it is whole, and its parts cannot be exchanged: leave {', '.join(given)} out")
        else:
            loaded: Any = EdgeGlassForConditionalGeneration.from_pretrained(name_or_path, output_loading_info=True)
            model, report = loaded
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"it lacks {len(missing)} weights, such as {missing[0]}")
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{name_or_path}: no decoder: {loading_error(error)}") from error
    return model.eval(), processor


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
