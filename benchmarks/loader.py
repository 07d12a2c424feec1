"""Whether the model waits for its data: the loader beside a training step, and what the loader alone delivers.

    make examples/towers
    python benchmarks/loader.py

Trains the towers of the demo, frozen, at 224 pixels on a parquet of 256 JPEGs (`benchmarks/decode.py` says of what) of
1024 x 768 pixels and captions of 10 to 40 words, with two workers. Prints one JSON line each: the share of the time
that the model waits for the next batch; what the loader delivers beside what the model takes; what of the work of one
worker is decoding, which tells whether decoding is the limit. The first two are about the machine at hand: a faster
model waits as soon as it takes more pictures per second than the loader delivers, and wants more workers; and where
model and workers share the cores, the workers take `core_seconds_of_loading` per step from it without any waiting.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.decode import cpu_seconds, photograph
from benchmarks.measure import REPEATS, alternate, report, seconds
from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from training.batches import EpochSampler, ImageTextCollator
from training.build import image_transforms
from training.data import PixmoParquetImageTextDataset
from training.transforms import load_pixels

TOWERS = Path(__file__).parents[1] / "examples" / "towers"
VISION, TEXT = str(TOWERS / "efficientnet-lite0"), str(TOWERS / "all-minilm-l6-v2")
NUM_ROWS, NUM_FILES, SIZE = 256, 32, (1024, 768)
BATCH_SIZE, NUM_WORKERS, STEPS, WARM_UP = 16, 2, 6, 3  # steps of one of several rounds
WORDS = ("a", "the", "old", "red", "house", "tree", "river", "street", "light", "behind", "under", "and", "of")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not TOWERS.is_dir():
        raise SystemExit("there are no towers: run `make examples/towers`")
    datasets.disable_progress_bars()
    processor = EdgeGlassProcessor.from_vision_text_pretrained(VISION, TEXT, image_size=224)
    transform = image_transforms(processor, is_training=True)
    files = [photograph(SIZE, seed) for seed in range(NUM_FILES)]
    with tempfile.TemporaryDirectory() as folder:
        dataset = PixmoParquetImageTextDataset(write_pairs(Path(folder) / "pairs.parquet", files), transform)
        waiting, total = train(EdgeGlassModel.from_vision_text_pretrained(VISION, TEXT), dataset, processor)
        loaded = BATCH_SIZE / wait_alone(dataset, processor)
        decoding, batching = cost(files, dataset, processor)
    conditions = {"batch_size": BATCH_SIZE, "workers": NUM_WORKERS, "cores": os.cpu_count(), "pictures": "1024 x 768"}
    report(
        "loader/share of time the model waits",
        ours=waiting,
        peer=total,
        unit="s per step",
        peer_is="the whole step",
        ratio=waiting / total,
        bound="<= 0.05",
        core_seconds_of_loading=round(BATCH_SIZE * batching, 3),
        **conditions,
    )
    report(
        "loader/pictures",
        ours=loaded,
        peer=BATCH_SIZE / (total - waiting),
        unit="pictures/s",
        peer_is="what the model takes when it does not wait",
        ratio=loaded * (total - waiting) / BATCH_SIZE,
        bound=">= 1",
        **conditions,
    )
    report(
        "loader/share of decoding",
        ours=1 / batching,
        peer=1 / decoding,
        unit="pictures per second of one core",
        peer_is="decoding and transforming alone",
        ratio=decoding / batching,
        bound=">= 0.7",
        **conditions,
    )


def train(
    model: EdgeGlassModel, dataset: PixmoParquetImageTextDataset, processor: EdgeGlassProcessor
) -> tuple[float, float]:
    """Seconds of a step that are spent waiting for the next batch, and all of them; medians over rounds of steps."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-4)
    model.train()
    batches = endless(dataset, processor)
    steps = []
    for step in range(WARM_UP + REPEATS * STEPS):
        start = time.perf_counter()
        batch = next(batches)
        arrived = time.perf_counter()
        inputs = {key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask")}
        model(**inputs, return_loss=True, step=step).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((arrived - start, time.perf_counter() - start))
    rounds = torch.tensor(steps[WARM_UP:]).view(REPEATS, STEPS, 2).mean(dim=1)
    waiting, total = rounds.median(dim=0).values.tolist()
    return waiting, total


def wait_alone(dataset: PixmoParquetImageTextDataset, processor: EdgeGlassProcessor) -> float:
    """Seconds for a batch when nothing is done with it."""
    batches = endless(dataset, processor)
    for _ in islice(batches, 4 * NUM_WORKERS):  # what was loaded ahead
        pass
    return statistics.median(seconds(lambda: list(islice(batches, STEPS))) for _ in range(REPEATS)) / STEPS


def cost(
    files: list[bytes], dataset: PixmoParquetImageTextDataset, processor: EdgeGlassProcessor
) -> tuple[float, float]:
    """Seconds of one core per picture for decoding alone, and for all that makes a batch of them."""
    torch.set_num_threads(1)  # as in a worker
    collate = ImageTextCollator(processor.tokenizer)
    rng = random.Random(0)
    taken = alternate(
        {
            "decoding": lambda: [load_pixels(data, dataset.image_transforms, rng) for data in files],
            "batching": lambda: [
                collate([dataset[row] for row in range(first, first + BATCH_SIZE)])
                for first in range(0, len(files), BATCH_SIZE)
            ],
        },
        measure=cpu_seconds,
    )
    return taken["decoding"] / len(files), taken["batching"] / len(files)


def endless(dataset: PixmoParquetImageTextDataset, processor: EdgeGlassProcessor) -> Iterator[dict[str, Any]]:
    """Epoch after epoch of batches, from one loader."""
    sampler = EpochSampler(len(dataset), BATCH_SIZE, seed=0)
    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        sampler=sampler,
        num_workers=NUM_WORKERS,
        persistent_workers=True,
        collate_fn=ImageTextCollator(processor.tokenizer),
    )
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def write_pairs(path: Path, files: list[bytes]) -> Path:
    """`NUM_ROWS` pictures with captions of 10 to 40 words."""
    rng = random.Random(0)
    captions = [" ".join(rng.choices(WORDS, k=rng.randint(10, 40))) for _ in range(NUM_ROWS)]
    images = [files[row % len(files)] for row in range(NUM_ROWS)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "caption": captions}), path)
    return path


if __name__ == "__main__":
    main()
