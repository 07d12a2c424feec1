"""Where a start in closed form helps, and whether training after it does: docs/recipes.md's study.

    python benchmarks/study.py --data DIR [--data-sets emoji clipart] [--seeds 3]

DIR holds emoji, clipart and icons as `{name}_train.parquet` and `{name}_val.parquet`. Both towers of the demo are
frozen; their tokens are kept in outputs/study. Each cell is added to benchmarks/study.jsonl as it is done, so that the
same command goes on after a kill; one whose cell is there is not run again. Needs the extra `bench`.

R@1 is the mean of both ways on val. A run is evaluated after every epoch, and at its start if that is the closed form;
all are kept, with the number of the one that has the lowest val loss. `icon names` are icons whose names were held out
of train.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from training.arguments import build_training_arguments  # noqa: E402
from training.build import build_datasets, build_model, build_processor  # noqa: E402
from training.caching import cache_features  # noqa: E402
from training.config import AlignmentConfig, load_config  # noqa: E402
from training.cpu import prepare_cpu  # noqa: E402
from training.data import PixmoParquetImageTextDataset  # noqa: E402
from training.initialization import initialize  # noqa: E402
from training.retrieval import retrieval_metrics  # noqa: E402
from training.trainer import AlignmentTrainer  # noqa: E402

CELLS = ROOT / "benchmarks/study.jsonl"
WORK = ROOT / "outputs/study"
DIMENSIONS = (4096, 2048, 1024, 512, 256, 128)
SHOWN = (4096, 512, 128)


@dataclass(frozen=True)
class DataSet:
    """How a data set is trained on.

    Args:
        file: What its files begin with.
        image_size: Pixels.
        sizes: Concepts in train, which are captions; None takes all.
        held_out: Concepts of train that are val in the place of the file's.
        batch_size: Pairs.
        epochs: Of training from a random start, and of the peer.
        epochs_after: Of training after the spectral start.
        lr: Peak rate from a random start, and of the peer.
        lr_after: Peak rate after the spectral start.
    """

    file: str
    image_size: int
    sizes: tuple[int | None, ...] = (None,)
    held_out: int = 0
    batch_size: int = 128
    epochs: int = 12
    epochs_after: int = 6
    lr: float = 1e-3
    lr_after: float = 1e-4


ICONS: dict[str, Any] = {"batch_size": 512, "epochs": 30, "epochs_after": 10, "lr": 3e-3, "lr_after": 3e-3}
DATA_SETS = {
    "emoji": DataSet("emoji", 224, (100, 300, 700, None)),
    "clipart": DataSet("clipart", 224),
    "icons": DataSet("icons", 128, (1000, 3000, None), **ICONS),
    "icon names": DataSet("icons", 128, held_out=861, **(ICONS | {"epochs_after": 5, "lr_after": 1e-3})),
}
POOLINGS = ("simple", "multihead", "statistics")
STARTS = ("random", "spectral", "sentence-transformers")


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    data: str
    concepts: int | None
    pooling: str
    start: str
    seed: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the parquet files")
    parser.add_argument("--data-sets", nargs="+", default=list(DATA_SETS), choices=DATA_SETS, metavar="NAME")
    parser.add_argument("--poolings", nargs="+", default=list(POOLINGS), choices=POOLINGS, metavar="NAME")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS, metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each cell (3)")
    options = parser.parse_args()
    done = {Cell(**row["cell"]) for row in read_cells()}
    todo = [cell for cell in cells(options) if cell not in done]
    for cell in tqdm(todo, desc="cells"):
        result = study(cell, options.data)
        with CELLS.open("a") as file:
            file.write(json.dumps({"cell": asdict(cell), **result}) + "\n")
        best = result["epochs"][result["best"]]
        tqdm.write(f"{cell}: R@1 {' / '.join(f'{best[str(size)]:.1f}' for size in SHOWN)}, {result['seconds']:.0f} s")


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """All that were asked for; one seed of all comes before the next seed."""
    for seed in range(1, options.seeds + 1):
        for data in options.data_sets:
            for concepts in DATA_SETS[data].sizes:
                for pooling in options.poolings:
                    for start in options.starts:
                        if (pooling, start) != ("multihead", "sentence-transformers"):  # which learns no pooling
                            yield Cell(data, concepts, pooling, start, seed)


def read_cells() -> list[dict[str, Any]]:
    """What is done."""
    return [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []


def study(cell: Cell, folder: Path, *overrides: str) -> dict[str, Any]:
    """Run a cell: R@1 in percent after every epoch, the number of the best one, and the seconds of training."""
    config = cell_config(cell, folder, *overrides)
    trainer = make_trainer(config, cell)
    started = time.perf_counter()
    if cell.start == "sentence-transformers":
        epochs = train_peer(trainer, cell)
    else:
        initialize(config, trainer)
        trainer.train()
        if trainer.preempted:
            sys.exit("stopped by a signal; the same command goes on with this cell")
        epochs = [
            {"loss": entry["eval_loss"], **{str(size): mean_r1(entry, size, "eval_") for size in SHOWN}}
            for entry in trainer.state.log_history
            if "eval_loss" in entry
        ]
    seconds = time.perf_counter() - started
    best = min(range(len(epochs)), key=lambda i: epochs[i]["loss"])
    return {"epochs": epochs, "best": best, "seconds": round(seconds, 1), "pairs": len(trainer.train_dataset)}


def cell_config(cell: Cell, folder: Path, *overrides: str) -> AlignmentConfig:
    """The demo's config with what the cell changes."""
    data = DATA_SETS[cell.data]
    changes = {
        "dataset.train_parquet": folder / f"{data.file}_train.parquet",
        "dataset.val_parquet": folder / f"{data.file}_val.parquet",
        "dataset.image_size": data.image_size,
        "dataset.batch_size": data.batch_size,
        "dataset.cache": "disk",
        "dataset.cache_dir": WORK,
        "vision_encoder.feature_layers": "[-1]",
        "text_encoder.feature_layers": "[-1]",
        "vision_encoder.pooling_type": cell.pooling,
        "text_encoder.pooling_type": cell.pooling,
        "optimization.init": "random" if cell.start == "sentence-transformers" else cell.start,
        "optimization.lr": data.lr_after if cell.start == "spectral" else data.lr,
        "trainer.output_dir": WORK / "run",
        "trainer.epochs": data.epochs_after if cell.start == "spectral" else data.epochs,
        "trainer.save_strategy": "no",
        "trainer.disable_tqdm": "true",
        "trainer.seed": cell.seed,
        "trainer.per_device_eval_batch_size": 128,
    }
    return load_config(ROOT / "configs/demo.yaml", [*(f"{key}={value}" for key, value in changes.items()), *overrides])


class Selected(PixmoParquetImageTextDataset):
    """Some rows of a data set.

    Args:
        whole: All of it.
        rows: Their numbers.
    """

    def __init__(self, whole: PixmoParquetImageTextDataset, rows: Sequence[int]) -> None:
        self.__dict__ |= whole.__dict__
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def _make_item(self, epoch: int, index: int) -> Any:
        return super()._make_item(epoch, self.rows[index])


def make_trainer(config: AlignmentConfig, cell: Cell) -> AlignmentTrainer:
    """As run_alignment.py makes it, without files, on the concepts of the cell."""
    args = build_training_arguments(config)
    prepare_cpu(args)
    torch.manual_seed(args.seed)
    model = build_model(config, args.seed)
    processor = build_processor(config, model)
    data = build_datasets(config, processor, args.seed)
    trainer = AlignmentTrainer(
        model, args, processing_class=processor, train_dataset=data["train"], eval_dataset=data["val"], visualize=False
    )
    cache_features(config.dataset, model, trainer, processor, data)
    captions = [data["train"].pairs.without_image(row).caption for row in range(len(data["train"]))]
    concepts = sorted(set(captions))
    random.Random(cell.seed).shuffle(concepts)
    held_out, concepts = concepts[: DATA_SETS[cell.data].held_out], concepts[DATA_SETS[cell.data].held_out :]
    trainer.train_dataset = select(data["train"], captions, concepts[: cell.concepts])
    if held_out:
        trainer.eval_dataset = select(data["train"], captions, held_out)
        trainer.eval_dataset.for_evaluation, trainer.eval_dataset.text_dropout_prob = True, 0.0
    return trainer


def select(whole: PixmoParquetImageTextDataset, captions: Sequence[str | None], concepts: Sequence[Any]) -> Selected:
    """The rows of some captions."""
    chosen = set(concepts)
    return Selected(whole, [row for row, caption in enumerate(captions) if caption in chosen])


def mean_r1(metrics: Any, size: int, prefix: str = "") -> float:
    """In percent, over both ways."""
    suffix = "" if size == DIMENSIONS[0] else f"@{size}"
    return 50 * (metrics[f"{prefix}i2t_r1{suffix}"] + metrics[f"{prefix}t2i_r1{suffix}"])


class TwoProjections(nn.Module):
    """What sentence-transformers' losses ask of a model, for two towers: each its own linear layer."""

    def __init__(self, width: int, other_width: int) -> None:
        super().__init__()
        self.sides = nn.ModuleDict(
            {"image": nn.Linear(width, DIMENSIONS[0]), "text": nn.Linear(other_width, DIMENSIONS[0])}
        )

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        return features | {"sentence_embedding": self.sides[features["side"]](features["pooled"])}

    def get_embedding_dimension(self) -> int:
        return DIMENSIONS[0]


def train_peer(trainer: AlignmentTrainer, cell: Cell) -> list[dict[str, float]]:
    """sentence-transformers' own losses on the same pooled features: scale 20, both directions, no equal captions."""
    from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    data, pooled = DATA_SETS[cell.data], {split: pool_all(trainer, split) for split in ("train", "val")}
    images, texts, ids = pooled["train"]
    torch.manual_seed(cell.seed)
    model = TwoProjections(images.shape[1], texts.shape[1])
    directions = ("query_to_doc", "doc_to_query")
    ranking = MultipleNegativesRankingLoss(model, directions=directions, partition_mode="per_direction")
    loss = MatryoshkaLoss(model, ranking, DIMENSIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=data.lr, weight_decay=0.01)
    batches = [list(unequal_batches(ids, data.batch_size, f"{cell.seed}/{e}")) for e in range(data.epochs)]
    steps = sum(map(len, batches))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, data.lr, total_steps=max(2, steps), pct_start=0.1)
    epochs, passed = [], 0.0
    for epoch in batches:
        started = time.perf_counter()
        for rows in epoch:
            optimizer.zero_grad()
            sides = [{"side": "image", "pooled": images[rows]}, {"side": "text", "pooled": texts[rows]}]
            loss(sides, labels=None).backward()
            optimizer.step()
            schedule.step()
        passed += time.perf_counter() - started
        epochs.append(evaluate_peer(model, loss, *pooled["val"]) | {"seconds": passed})
    return epochs


def unequal_batches(ids: Tensor, size: int, seed: str) -> Iterator[list[int]]:
    """Rows in random order and whole batches, none with two equal captions: its NO_DUPLICATES sampler."""
    remaining = list(range(len(ids)))
    random.Random(seed).shuffle(remaining)
    while remaining:
        batch: dict[int, int] = {}
        rest = []
        for row in remaining:
            if len(batch) < size and int(ids[row]) not in batch:
                batch[int(ids[row])] = row
            else:
                rest.append(row)
        if len(batch) < min(size, len(ids.unique())):
            return
        yield list(batch.values())
        remaining = rest


@torch.no_grad()
def evaluate_peer(model: TwoProjections, loss: nn.Module, images: Tensor, texts: Tensor, ids: Tensor) -> Any:
    """Val loss of batches as ours, and R@1."""
    sides = [{"side": "image", "pooled": images}, {"side": "text", "pooled": texts}]
    embeds = [F.normalize(model(side)["sentence_embedding"], dim=1) for side in sides]
    value = float(loss([dict(side) for side in sides], labels=None))
    metrics = retrieval_metrics(embeds[0], embeds[1], DIMENSIONS[1:], [ids])
    return {"loss": value, **{str(size): mean_r1(metrics, size) for size in SHOWN}}


@torch.no_grad()
def pool_all(trainer: AlignmentTrainer, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled features, at the start of attention, and ids of captions."""
    model, loader = trainer.model, trainer.get_eval_dataloader(trainer.train_dataset if split == "train" else None)
    columns = []
    for batch in loader:
        columns.append(
            (
                model.vision_encoder.pool(batch["image_features"]),
                model.text_encoder.pool(batch["text_features"], batch.get("attention_mask")),
                batch["token_hashes"],
            )
        )
    return tuple(map(torch.cat, zip(*columns, strict=True)))


if __name__ == "__main__":
    main()
