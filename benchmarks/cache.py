"""Training steps from kept features beside steps that run the towers, and what int8 costs in recall.

    python benchmarks/cache.py

The demo's data and towers at 224 pixels, simple pooling of the last layers, batches of 64. A step is the loader's
batch, forward and backward pass and AdamW. Prints two JSON lines.
"""

import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import alternate, report, seconds  # noqa: E402
from tests.runs import make_trainer  # noqa: E402
from training.batches import EpochSampler  # noqa: E402
from training.cpu import prepare_cpu  # noqa: E402
from training.feature_cache import Entry, FeatureCache  # noqa: E402
from training.retrieval import retrieval_metrics  # noqa: E402
from training.trainer import AlignmentTrainer  # noqa: E402

IMAGE_SIZE, BATCH_SIZE, TRAIN_PAIRS, RECALL_PAIRS, EPOCHS = 224, 64, 768, 512, 10
STEPS = 8  # of kept features, against one that runs the towers


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = folder / "train.parquet"
        pairs = datasets.Dataset.from_parquet(str(ROOT / "examples/data/emoji_train.parquet"))
        pairs.shuffle(seed=0).select(range(TRAIN_PAIRS)).to_parquet(train)
        options = [
            f"dataset.train_parquet={train}",
            f"dataset.image_size={IMAGE_SIZE}",
            f"trainer.epochs={EPOCHS}",
            *(f"{side}_encoder.pooling_type=simple" for side in ("vision", "text")),
            *(f"{side}_encoder.feature_layers=[-1]" for side in ("vision", "text")),
            "optimization.init=random",
            "optimization.lr=1e-3",
            "trainer.eval_strategy=no",
            "trainer.save_strategy=no",
            "trainer.disable_tqdm=true",
        ]
        recompute = make_trainer(ROOT / "configs/demo.yaml", *options, "dataset.cache=off",
                                 f"trainer.output_dir={folder}/a")  # fmt: skip
        prepare_cpu(recompute.args)  # as a run does
        filling = seconds(lambda: make_trainer(ROOT / "configs/demo.yaml", *options, *cached(folder)))
        kept = make_trainer(ROOT / "configs/demo.yaml", *options, *cached(folder))
        medians = alternate({"towers": stepper(recompute, 1), "kept": stepper(kept, STEPS)})
        ours, peer = STEPS * BATCH_SIZE / medians["kept"], BATCH_SIZE / medians["towers"]
        report(
            "token cache/training after the first pass",
            ours=ours,
            peer=peer,
            unit="pairs/s",
            peer_is="the same step, running both frozen towers",
            ratio=ours / peer,
            bound=">= 15",
            image_size=IMAGE_SIZE,
            batch_size=BATCH_SIZE,
            dtype="float16",
            first_pass_pairs_per_second=round(TRAIN_PAIRS / filling, 1),
        )
        kept.train()
        report_int8(kept, recompute, folder)


def cached(folder: Path) -> list[str]:
    return ["dataset.cache=disk", f"dataset.cache_dir={folder}/cache", f"trainer.output_dir={folder}/b"]


def stepper(trainer: AlignmentTrainer, steps: int) -> Callable[[], None]:
    """Takes `steps` training steps each time it is called."""
    model = trainer._model.train()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)
    sampler = EpochSampler(TRAIN_PAIRS, BATCH_SIZE, seed=0)
    loader = DataLoader(trainer.train_dataset, BATCH_SIZE, sampler=sampler, collate_fn=trainer.data_collator)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run() -> None:
        for batch in itertools.islice(batches, steps):
            trainer.compute_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


@torch.no_grad()
def report_int8(trained: AlignmentTrainer, uncached: AlignmentTrainer, folder: Path) -> None:
    """R@1 of the trained layers on features of float32 and of int8."""
    model = trained._model.eval()
    whole, quantised = [], []
    for start in range(0, RECALL_PAIRS, BATCH_SIZE):
        items = [uncached.train_dataset[index] for index in range(start, start + BATCH_SIZE)]
        batch = uncached.data_collator(items)
        images = model.vision_encoder.features(batch["pixel_values"])
        texts, mask = model.text_encoder.features(batch["input_ids"], batch["attention_mask"])
        whole.append(torch.stack([model.vision_encoder(features=images), model.text_encoder(None, mask, texts)]))
        images = through_int8(images, folder)
        texts = through_int8(texts, folder)
        quantised.append(torch.stack([model.vision_encoder(features=images), model.text_encoder(None, mask, texts)]))
    sizes = model.config.mrl_dimensions
    before, after = (retrieval_metrics(*torch.cat(embeds, dim=1), sizes) for embeds in (whole, quantised))
    recalls = [name for name in before if "_r1" in name]
    differences = [abs(after[name] - before[name]) * 100 for name in recalls]
    mean_before, mean_after = (sum(metrics[name] for name in recalls) / len(recalls) for metrics in (before, after))
    report(
        "token cache/R@1 of int8",
        ours=100 * mean_after,
        peer=100 * mean_before,
        unit="% (mean of both ways and six sizes)",
        peer_is="float32",
        ratio=mean_after / mean_before,
        bound="<= 0.5 points of difference at any size",
        bounded=max(differences),
        largest_difference=round(max(differences), 3),
        pairs=RECALL_PAIRS,
    )


def through_int8(features: torch.Tensor, folder: Path) -> torch.Tensor:
    """Features (B, N, D) as the cache gives them back."""
    cache = FeatureCache(folder / "int8", "vision", {}, len(features), "int8")
    cache.write(0, [Entry(tokens) for tokens in features])
    return torch.stack([cache[i].features for i in range(len(features))])


if __name__ == "__main__":
    main()
