"""Tiny language models with random weights."""

from pathlib import Path

import torch
from tokenizers.decoders import WordPiece
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.towers import tiny_tokenizer

FAMILIES = ("qwen3", "qwen2", "llama", "gemma3_text", "gpt2")


def tiny_language_config(family: str, **changes: int) -> dict:
    """Two layers, 32 wide, 256 positions; weights large enough that tokens differ."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": len(tiny_tokenizer())}
    if family != "gpt2":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
    if family == "gemma3_text":
        sizes |= {"sliding_window": 16, "query_pre_attn_scalar": 8}
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    sizes |= {"max_position_embeddings": 256, "initializer_range": 0.3}
    return {"model_type": family, **sizes, **tokens, **changes}


def save_tiny_language_model(path: Path, family: str = "qwen3") -> str:
    """One with its tokenizer, as a transformers directory."""
    torch.manual_seed(2)
    config = tiny_language_config(family)
    model_type = config.pop("model_type")
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**config)).save_pretrained(path)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"
    tokenizer.backend_tokenizer.decoder = WordPiece()  # words again, of their pieces
    tokenizer.save_pretrained(path)
    return str(path)
