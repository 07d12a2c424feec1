"""Describing pictures with the language model's cache of keys and values beside doing without, and training from kept
features beside passing the pictures through the vision tower in every step.

    python benchmarks/generation.py

A language model of the shape of Gemma 3 270M, random weights, float32; the demo's towers, with random projections.
Prints two JSON lines.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import alternate, report  # noqa: E402
from modeling_edgeglass import (  # noqa: E402
    EdgeGlassDecodingConfig,
    EdgeGlassForConditionalGeneration,
    EdgeGlassModel,
)

NEW_TOKENS, PICTURES, PREFIX = 64, 8, 16
STEP_PICTURES, ANSWER = 32, 8
THREADS = 2
GEMMA = {
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 2048,
    "vocab_size": 262144,
    "sliding_window": 512,
}


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    towers = ROOT / "examples/towers"
    alignment = EdgeGlassModel.from_vision_text_pretrained(towers / "efficientnet-lite0", towers / "all-minilm-l6-v2")
    language_model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3_text"](**GEMMA))
    config = EdgeGlassDecodingConfig(alignment_config=alignment.config, text_config=language_model.config)
    model = EdgeGlassForConditionalGeneration(config, alignment, language_model).eval()
    conditions = {"language_model": "shape of Gemma 3 270M", "dtype": "float32", "threads": THREADS, "prefix": PREFIX}

    embeds = torch.nn.functional.normalize(torch.randn(PICTURES, config.sizes[0]), dim=1)
    fixed = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    ways = {
        "ours": partial(model.generate, image_embeds=embeds, **fixed),
        "peer": partial(say_without_cache, model, embeds),
    }
    taken = alternate(ways)
    report(
        f"decoding/{NEW_TOKENS} new tokens of {PICTURES} pictures",
        ours=taken["ours"],
        peer=taken["peer"],
        unit="s",
        peer_is="the same without cache of keys and values",
        ratio=taken["peer"] / taken["ours"],
        bound=">= 3",
        **conditions,
    )

    pixels = torch.randn(STEP_PICTURES, 3, 224, 224)
    kept = model.alignment.get_image_features(pixels)
    ids = torch.randint(5, 1000, (STEP_PICTURES, ANSWER))

    def step(**described: torch.Tensor) -> None:
        model.train()
        model(**described, input_ids=ids, labels=ids, step=0).loss.backward()

    taken = alternate({"ours": partial(step, image_embeds=kept), "peer": partial(step, pixel_values=pixels)})
    report(
        f"decoding/a training step of {STEP_PICTURES} pictures",
        ours=taken["ours"],
        peer=taken["peer"],
        unit="s",
        peer_is="with the vision tower, which is frozen",
        ratio=taken["peer"] / taken["ours"],
        bound=">= 1",
        answer_tokens=ANSWER,
        **conditions,
    )


@torch.no_grad()
def say_without_cache(model: EdgeGlassForConditionalGeneration, embeds: Tensor) -> Tensor:
    """The likeliest tokens, each from the whole sequence; transformers itself knows no way but its cache here."""
    ids = torch.empty(len(embeds), 0, dtype=torch.long)
    for _ in range(NEW_TOKENS):
        logits = model(image_embeds=embeds, input_ids=ids, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(dim=2)], dim=1)
    return ids


if __name__ == "__main__":
    main()
