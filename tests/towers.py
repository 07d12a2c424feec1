"""Tiny towers with random weights, made on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, EfficientNetConfig, PreTrainedTokenizerFast, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE_SIZE = 32  # pixels


def save_tiny_vision_tower(path: Path) -> str:
    """A ViT with its image processor, as a transformers directory."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(**TINY, image_size=IMAGE_SIZE, patch_size=8)).save_pretrained(path)
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(path)
    return str(path)


def save_tiny_text_tower(path: Path) -> str:
    """A BERT with 64 positions and its tokenizer, as a transformers directory."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    BertModel(BertConfig(**TINY, vocab_size=len(tokenizer), max_position_embeddings=64)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words are split into letters: every text has tokens, every letter is known."""
    letters = [chr(code) for code in range(33, 127)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def tiny_efficientnet() -> EfficientNetConfig:
    """With weights large enough that a signal passes through the random network."""
    return EfficientNetConfig(width_coefficient=0.025, depth_coefficient=0.1, hidden_dim=32, initializer_range=0.5)
