"""Finding and loading the language model that puts embeddings into words: any causal one of transformers."""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .configuration_edgeglass import EdgeGlassDecodingConfig

IGNORED_LABEL = -100  # of a token that is not to be predicted; torch's own number


def load_language_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """Load a pretrained causal language model.

    Args:
        name_or_path: Model id on the Hub, or a directory that `save_pretrained` wrote.
        revision: Commit, tag or branch on the Hub.
        trust_remote_code: Run model code that comes with the checkpoint.
        load_in_4bit: Keep its weights in 4 bits (NF4 of QLoRA, arXiv:2305.14314), by bitsandbytes on this process's
            GPU (LOCAL_RANK).
        dtype: Its precision; `"auto"` takes the checkpoint's own.

    Raises:
        ValueError: There is no such model, it is no causal language model, or 4 bits are not possible here.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "dtype": dtype}
    if load_in_4bit:
        options["quantization_config"] = _four_bits()
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"language model {name_or_path!r} cannot be loaded: {reason}") from error
    return model


def build_language_model(config: EdgeGlassDecodingConfig) -> PreTrainedModel:
    """One with random weights, as its config describes."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config.text_config)
    return model


def add_adapters(model: nn.Module, config: EdgeGlassDecodingConfig) -> None:
    """Put low-rank adapters (LoRA, arXiv:2106.09685) into the linear layers of a language model; they alone train.

    They start as no change, in float32: in a half-precision model small updates would round away.

    Raises:
        ValueError: peft is not installed, or no layer has one of the names.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.tuners_utils import cast_adapter_dtype
    except ImportError as error:
        raise ValueError("language_training 'lora' needs peft: pip install peft") from error
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.lora_target_modules,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(lora, model)
    cast_adapter_dtype(model, "default")


def num_predicting(labels: Tensor) -> int:
    """How many of the last positions predict a label (B, L) or follow one that does; 1 or more.

    What predicts a label stands one before it.
    """
    labelled = (labels != IGNORED_LABEL).any(dim=0).nonzero()
    return labels.shape[1] - max(0, int(labelled[0]) - 1) if len(labelled) else 1


def _four_bits() -> Any:
    if not torch.cuda.is_available():
        raise ValueError("load_in_4bit wants a CUDA GPU, and there is none; leave it off")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError("load_in_4bit needs bitsandbytes: pip install bitsandbytes") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
