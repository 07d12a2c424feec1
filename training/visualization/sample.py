"""What the figures of an evaluation show: a few pairs with their embeddings, pictures, captions and finds.

Drawn at random from the whole set, and kept as one file, so that figures can be drawn again without model and data.
"""

import json
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling_edgeglass import EdgeGlassModel
from training.data import PixmoParquetImageTextDataset
from training.errors import DataError
from training.history import logged_names
from training.retrieval import EncodedPairs
from training.transforms import ImageTransform
from training.visualization.gallery import Gallery, find_nearest
from training.visualization.style import thumbnail

logger = logging.getLogger(__name__)

SAMPLE_FILE = "evaluation_sample.safetensors"
MAX_PAIRS = 256  # of the embedding space; a similarity matrix shows the first 64 of them
NUM_TEXT_QUERIES, NUM_IMAGE_QUERIES, NUM_ATTENTION = 5, 3, 6
MAX_CAPTION = 300  # characters that are kept


@dataclass(frozen=True)
class EvaluationSample:
    """A random part of an evaluation.

    Args:
        step: Optimizer step of the model.
        metrics: What the whole evaluation measured, under the logged names.
        image_embeds: Unit vectors (M, D), M up to 256.
        text_embeds: Unit vectors (M, D).
        captions: Their M captions.
        pictures: Small RGB pictures of the galleries, uint8 (P, 128, 128, 3).
        picture_captions: Their P captions.
        text_to_image: Pictures found for captions, as places among the P.
        image_to_text: Captions found for pictures.
        attended: Pictures as the model sees them, uint8 (A, S, S, 3); none where the pooling is not learned.
        attention: The pooling's weights (A, height, width).
    """

    step: int
    metrics: Mapping[str, float]
    image_embeds: Tensor
    text_embeds: Tensor
    captions: Sequence[str]
    pictures: Tensor
    picture_captions: Sequence[str]
    text_to_image: Gallery
    image_to_text: Gallery
    attended: Tensor
    attention: Tensor


def sample_evaluation(
    encoded: EncodedPairs, metrics: Mapping[str, float], model: EdgeGlassModel, *, step: int, seed: int
) -> EvaluationSample:
    """Draw a sample of an evaluation; the same pairs for the same seed and set.

    Args:
        encoded: A `PixmoParquetImageTextDataset` as it was encoded.
        metrics: What was measured.
        model: The model that encoded it, in eval mode.
        step: Its optimizer step.
        seed: Seed of the draw.
    """
    dataset: PixmoParquetImageTextDataset = encoded.dataset
    pairs = random.Random(f"{seed}/evaluation sample").sample(range(len(encoded.rows)), len(encoded.rows))
    text_queries, image_queries = pairs[:NUM_TEXT_QUERIES], pairs[-NUM_IMAGE_QUERIES:]
    embeds = encoded.image_embeds, encoded.text_embeds
    text_to_image = find_nearest(torch.tensor(text_queries), embeds[1], embeds[0], encoded.match_ids)
    image_to_text = find_nearest(torch.tensor(image_queries), embeds[0], embeds[1], encoded.match_ids)
    shown = sorted({*text_queries, *image_queries, *text_to_image.found.flatten().tolist(),
                    *image_to_text.found.flatten().tolist()})  # fmt: skip
    thumbnails = [thumbnail(dataset.pair(int(encoded.rows[pair]))[0]) for pair in shown]

    def captions_of(pairs: Iterable[int]) -> list[str]:
        return [(dataset.pairs[int(encoded.rows[pair])].caption or "")[:MAX_CAPTION] for pair in pairs]

    attended, attention = _attention(dataset, model, [int(encoded.rows[pair]) for pair in pairs[:NUM_ATTENTION]])
    drawn = torch.tensor(pairs[:MAX_PAIRS])
    return EvaluationSample(
        step=step,
        metrics=logged_names(metrics),
        image_embeds=embeds[0][drawn].half(),
        text_embeds=embeds[1][drawn].half(),
        captions=captions_of(drawn.tolist()),
        pictures=torch.from_numpy(np.stack(thumbnails)),
        picture_captions=captions_of(shown),
        text_to_image=_among(shown, text_to_image),
        image_to_text=_among(shown, image_to_text),
        attended=attended,
        attention=attention,
    )


def _among(shown: Sequence[int], gallery: Gallery) -> Gallery:
    """A gallery whose numbers are places among the pairs that are shown."""
    places = torch.full((max(shown) + 1,), -1)
    places[torch.tensor(shown)] = torch.arange(len(shown))
    return Gallery(places[gallery.queries], places[gallery.found], gallery.hits, gallery.ranks)


@torch.no_grad()
def _attention(
    dataset: PixmoParquetImageTextDataset, model: EdgeGlassModel, rows: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Pictures as the model sees them (A, S, S, 3), and the pooling's weights; both empty where there are none."""
    none = torch.zeros(0, 1, 1, 3, dtype=torch.uint8), torch.zeros(0, 1, 1)
    transform = dataset.image_transforms
    if model.vision_encoder.pooling is None or not isinstance(transform, ImageTransform):
        return none
    pixel_values = torch.stack([dataset.pixels(dataset.pairs[row], dataset.view_rng(0, row)) for row in rows])
    try:
        weights = model.vision_encoder.attention_map(pixel_values.to(model.device)).float().cpu()
    except ValueError as error:  # a tower whose tokens have no places
        logger.info("no attention map: %s", error)
        return none
    mean, std = (torch.tensor(values)[:, None, None] for values in (transform.image_mean, transform.image_std))
    pixels = ((pixel_values * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous(), weights


def save_sample(sample: EvaluationSample, output_dir: str | os.PathLike[str]) -> None:
    """Write the sample to a run's output directory, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    words: dict[str, Any] = {}
    for field in fields(sample):
        value = getattr(sample, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.contiguous()
        elif isinstance(value, Gallery):
            tensors |= {f"{field.name}.{part.name}": getattr(value, part.name) for part in fields(value)}
        else:
            words[field.name] = value
    path = Path(output_dir) / SAMPLE_FILE
    aside = path.with_name(path.name + ".tmp")
    save_file(tensors, aside, metadata={name: json.dumps(value) for name, value in words.items()})
    aside.replace(path)


def remove_sample(output_dir: str | os.PathLike[str]) -> None:
    """Forget the sample of the evaluation before."""
    (Path(output_dir) / SAMPLE_FILE).unlink(missing_ok=True)


def load_sample(output_dir: str | os.PathLike[str]) -> EvaluationSample | None:
    """The sample of a run's last evaluation; None where it has none.

    Raises:
        DataError: The file is damaged.
    """
    path = Path(output_dir) / SAMPLE_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            words = {name: json.loads(value) for name, value in file.metadata().items()}
        galleries: dict[str, Any] = {
            name: Gallery(*(tensors.pop(f"{name}.{part.name}") for part in fields(Gallery)))
            for name in ("text_to_image", "image_to_text")
        }
        return EvaluationSample(**tensors, **words, **galleries)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is damaged: {error}; the next evaluation writes it anew") from error
