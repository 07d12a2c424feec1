"""The sections of a decoding run."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING, OmegaConf

from training.config import PAIRS_RULES, AdamWConfig, PairsConfig
from training.config_files import (
    ABOVE_ZERO,
    OPTIMIZATION_RULES,
    Rule,
    at_least,
    check_value,
    has_max_steps,
    key_error,
    load_sections,
    one_of,
)

LANGUAGE_TRAINING = one_of("frozen", "lora", "full")  # LANGUAGE_TRAININGS of modeling_edgeglass: importing needs torch

_TARGETS: Rule = "all-linear, or a list of names", lambda value: isinstance(value, str) or OmegaConf.is_list(value)


@dataclass
class AnswersConfig(PairsConfig):
    """Pictures with what is to be said of them: captions, or answers to questions."""

    batch_size: int = 32  # pairs per process and step
    max_text_length: int = 128  # tokens of an answer, with the one that ends it; longer ones are cut
    cache: str = "pooled"  # of the alignment, computed once: pooled, a few KB a pair | disk, tokens | off
    caption_column: str | None = None  # what is to be said; None finds answer, caption, text or txt
    question_column: str | None = None  # None finds question; where there is none, all are asked the prompt
    prompt: str = "Describe the picture."  # what is asked where there is no question
    source: str = "images"  # what the bridge is trained on: images | text, embeddings of captions with noise
    text_noise: float = 1.0  # length of the noise, by that of an embedding; of source text


@dataclass
class BridgeConfig:
    """What is bridged, and how."""

    alignment: str = MISSING  # directory or id on the Hub of a trained alignment
    alignment_revision: str | None = None  # commit, tag or branch on the Hub
    language_model: str = "Qwen/Qwen2.5-7B-Instruct"  # directory or id of a causal language model
    language_revision: str | None = None
    language_trust_remote_code: bool = False  # run model code that comes with the language model
    num_prefix_tokens: int = 16  # soft tokens that an embedding becomes
    language_training: str = "frozen"  # of the language model: frozen | lora, low-rank adapters | full
    lora_rank: int = 16
    lora_alpha: int = 32  # adapters are scaled by lora_alpha / lora_rank
    lora_target_modules: Any = "all-linear"  # layers that get one: all-linear, or a list of names
    load_in_4bit: bool = False  # keep the language model in 4 bits; wants a GPU and bitsandbytes


@dataclass
class GenerationConfig:
    """How val pictures are described in an evaluation."""

    num_beams: int = 1  # 1: the likeliest token each time
    num_samples: int = 20  # pictures that are described and shown after every evaluation
    num_scored: int = 500  # pictures that are described and scored after training, at every size


@dataclass
class DecodingConfig:
    """A whole run."""

    dataset: AnswersConfig = field(default_factory=AnswersConfig)
    decoding: BridgeConfig = field(default_factory=BridgeConfig)
    optimization: AdamWConfig = field(default_factory=AdamWConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # epochs, output_dir, resume, fields of TrainingArguments


_RULES: dict[str, Rule] = {
    **PAIRS_RULES,
    **OPTIMIZATION_RULES,
    "dataset.source": one_of("images", "text"),
    "dataset.text_noise": at_least(0),
    "decoding.num_prefix_tokens": at_least(1),
    "decoding.language_training": LANGUAGE_TRAINING,
    "decoding.lora_rank": at_least(1),
    "decoding.lora_alpha": at_least(1),
    "decoding.lora_target_modules": _TARGETS,
    "generation.num_beams": at_least(1),
    "generation.num_samples": at_least(0),
    "generation.num_scored": at_least(0),
}


def load_decoding_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> DecodingConfig:
    """Read the config of a decoding run; see `load_sections`.

    Args:
        path: A YAML file with the sections of `DecodingConfig`.
        overrides: Such as `decoding.language_model=Qwen/Qwen2.5-0.5B-Instruct`.

    Raises:
        ConfigError: The file is missing or no YAML, or a key, a type or a value is wrong.
    """
    config = load_sections(DecodingConfig, _RULES, path, overrides)
    if not has_max_steps(config):
        check_value(config, "trainer.epochs", config.trainer["epochs"], ABOVE_ZERO)
    if config.decoding.load_in_4bit and config.decoding.language_training == "full":
        reason = "weights of 4 bits cannot train; set decoding.language_training to lora or frozen"
        raise key_error(config, "decoding.load_in_4bit", reason)
    return config
