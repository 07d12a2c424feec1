"""A saved alignment for devices without torch: its two encoders as ONNX files, in float32 and in int8.

    python -m training.export outputs/demo --onnx --truncate_dim 512

Writes `image_encoder.onnx` and `text_encoder.onnx`, the same with `_int8`, the tokenizer, and `export.json`: how
pictures are prepared, how far ONNX is from torch, and the recall that int8 keeps. `examples/onnx_without_torch.py`
shows how they are used.
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import ConfigError, DataError, UserError, clear_write_errors

REPORT = "export.json"
NEEDED = ("onnx", "onnxscript", "onnxruntime")
RECALL_SIZES = (512, 128)  # besides the full one
_RECALL_KS = (1, 10)
_BATCH_SIZE = 32


def main() -> None:
    try:
        print(describe(export(parse_options())))
    except UserError as error:
        sys.exit(f"error: {error}")


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Write the export; returns what its `export.json` holds.

    Raises:
        ConfigError: There is no model, an option has no possible value, or a tower cannot be exported.
        DataError: The pairs of `--parquet` cannot be read.
        OutputError: The disk is full.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"an export wants {' and '.join(missing)}: pip install {' '.join(missing)}")
    if not options.output_dir.is_dir():
        raise ConfigError(f"{options.output_dir}: is no directory; name a run's output directory or a saved model's")
    # As in run_alignment.py, --help does not wait for torch.
    from training.build import load_model
    from training.files import weights_fingerprint
    from training.onnx_encoders import write_encoders

    source = options.output_dir / "model" if (options.output_dir / "model").is_dir() else options.output_dir
    model, processor = load_model(str(source))
    full = model.config.projection_dim
    if options.truncate_dim is not None and not 1 <= options.truncate_dim <= full:
        raise ConfigError(f"--truncate_dim: must be in 1..{full}, got {options.truncate_dim}")
    dataset, reason = find_pairs(options, processor)
    with written_aside(options.output or options.output_dir / "onnx") as folder:
        save_tokenizer(processor.tokenizer, folder / "tokenizer.json")
        report = write_encoders(model.float().eval(), processor, options.truncate_dim, dataset, folder)
        report["weights"] = weights_fingerprint(source)
        report["recall"] = None if dataset is None else measure_recall(folder, processor, dataset)
        report["recall_not_measured"] = reason
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


@contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A directory beside `folder` that takes its place, and that of an earlier export, if all goes well.

    Raises:
        ConfigError: `folder` holds something else than an export, or cannot be written.
        OutputError: The disk is full.
    """
    if folder.exists() and not (folder / REPORT).is_file():
        raise ConfigError(f"{folder}: is there and no export, so that it is not replaced; --output names another")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); --output names another") from error
    aside, replaced = work / "new", work / "old"
    try:
        with clear_write_errors(folder):
            aside.mkdir()
            yield aside
            if folder.exists():
                folder.rename(replaced)
            aside.rename(folder)
    finally:
        if replaced.exists() and not folder.exists():
            replaced.rename(folder)
        shutil.rmtree(work, ignore_errors=True)


def find_pairs(options: argparse.Namespace, processor: Any) -> tuple[Any, str | None]:
    """The pairs that recall is measured on; or None, and why there are none.

    Raises:
        ConfigError: The run's config.yaml cannot be read.
        DataError: The pairs of `--parquet` cannot be read; those of config.yaml may be gone since the run.
    """
    from training.build import image_transforms
    from training.config import load_config
    from training.data import PixmoParquetImageTextDataset

    parquet, columns = options.parquet, dict[str, Any]()
    if parquet is None:
        config_file = options.output_dir / "config.yaml"
        if not config_file.is_file():
            return None, f"{options.output_dir} holds no config.yaml, whose val_parquet it would be measured on"
        config = load_config(config_file).dataset
        parquet = config.val_parquet
        columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    length, transform = processor.tokenizer.model_max_length, image_transforms(processor, is_training=False)
    try:
        dataset = PixmoParquetImageTextDataset(parquet, transform, length, for_evaluation=True, **columns)
        if len(dataset) < 2:
            raise DataError(f"{parquet}: one pair is no set to measure: retrieval needs two or more")
    except DataError as error:
        if options.parquet is not None:
            raise
        return None, str(error)
    return dataset, None


def save_tokenizer(tokenizer: Any, path: Path) -> None:
    """Write the tokenizer as a file of the `tokenizers` library that cuts and pads by itself.

    Raises:
        ConfigError: The tokenizer is none of that library, or its file gives other ids.
    """
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} is no tokenizer of the tokenizers library, which alone is exported"
        )
    alone = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    alone.enable_truncation(tokenizer.model_max_length, direction=tokenizer.truncation_side)
    alone.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    alone.save(str(path))
    captions = ["a dog", "", "3 + 4 = 7: is it not?", "Naïve " * min(tokenizer.model_max_length, 1000)]
    expected = tokenizer(captions, padding=True, truncation=True)
    found = Tokenizer.from_file(str(path)).encode_batch(captions)
    if [[*text.ids, *text.attention_mask] for text in found] != [
        [*ids, *mask] for ids, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)
    ]:
        raise ConfigError(f"{type(tokenizer).__name__} does more than its file tells: it cannot be exported")


def measure_recall(folder: Path, processor: Any, dataset: Any) -> dict[str, Any]:
    """R@1 and R@10 both ways, 0..1, of the float32 and the int8 files on the good pairs of `dataset`.

    Returns:
        `pairs` and `bad_rows`; `float32` and `int8`, each with `i2t_r1`, `i2t_r1@512` and so on; and `kept`, by K
        and size: the mean of both ways in int8 by that in float32, None where that is 0.

    Raises:
        DataError: There are no two good pairs.
    """
    import torch
    from tqdm import tqdm

    from training.batches import ImageTextCollator
    from training.onnx_encoders import TOWERS, WEIGHTS, open_session, run_session
    from training.retrieval import retrieval_metrics

    collate = ImageTextCollator(processor.tokenizer)
    files = [(weights, tower) for weights in WEIGHTS for tower in TOWERS]
    sessions = {
        (weights, tower): open_session(folder / f"{tower}_encoder{WEIGHTS[weights]}.onnx") for weights, tower in files
    }
    embeds: dict[tuple[str, str], list[Any]] = {file: [] for file in files}
    ids = []
    for start in tqdm(range(0, len(dataset), _BATCH_SIZE), desc="recall", unit="batch"):
        items = [dataset[i] for i in range(start, min(start + _BATCH_SIZE, len(dataset)))]
        if good := [item for item in items if item["is_valid"]]:
            batch = collate(good)
            ids.append(torch.stack([batch["image_ids"], batch["caption_ids"]]))
            for file in files:
                embeds[file].append(run_session(sessions[file], batch))
    num_pairs = sum(part.shape[1] for part in ids)
    num_bad = len(dataset) - num_pairs
    if num_pairs < 2:
        raise DataError(f"of the {len(dataset)} pairs {num_bad} are bad: retrieval needs two good ones")
    match_ids = list(torch.cat(ids, dim=1))
    found: dict[str, Any] = {"pairs": num_pairs, "bad_rows": num_bad}
    for weights in WEIGHTS:
        images, texts = (torch.cat(embeds[weights, tower]) for tower in TOWERS)
        sizes = [size for size in RECALL_SIZES if size < images.shape[1]]
        metrics = retrieval_metrics(images, texts, sizes, match_ids)
        wanted = [f"r{k}{suffix}" for suffix in ("", *(f"@{size}" for size in sizes)) for k in _RECALL_KS]
        found[weights] = {f"{way}_{name}": metrics[f"{way}_{name}"] for name in wanted for way in ("i2t", "t2i")}
    found["kept"] = {}
    for name in wanted:
        before, after = (found[weights][f"i2t_{name}"] + found[weights][f"t2i_{name}"] for weights in WEIGHTS)
        found["kept"][name] = after / before if before else None
    return found


def describe(report: Mapping[str, Any]) -> str:
    """An export's numbers as text."""
    largest = ", ".join(f"{tower} {value:.0e}" for tower, value in report["largest_difference_from_torch"].items())
    sizes = ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in report["bytes"].items())
    recall = report["recall"]
    if recall is None:
        measured = f"recall of int8 was not measured: {report['recall_not_measured']}; --parquet FILE measures it"
    else:
        measured = recall_table(recall, report["dimension"])
    return f"files: {sizes}\nlargest difference from torch: {largest}\n{measured}"


def recall_table(recall: Mapping[str, Any], dimension: int) -> str:
    """R@1 and R@10 in percent, both ways, of both kinds of weights at every size, and what int8 keeps of their mean.

    Args:
        recall: As `measure_recall` gives it.
        dimension: The full size.
    """
    header = "dimension | weights | i2t R@1  R@10 | t2i R@1  R@10 | kept R@1  R@10"
    lines = [f"share of queries with a match among the first K, in percent, of {recall['pairs']} pairs", header]
    lines.append("-" * len(header))
    for size in (dimension, *(size for size in RECALL_SIZES if size < dimension)):
        names = [f"r{k}{'' if size == dimension else f'@{size}'}" for k in _RECALL_KS]
        for weights in ("float32", "int8"):
            ways = [" ".join(_percent(recall[weights][f"{way}_{name}"]) for name in names) for way in ("i2t", "t2i")]
            kept = " ".join(_percent(recall["kept"][name]) for name in names) if weights == "int8" else ""
            lines.append(f"{size:9d} | {weights:7} |   {ways[0]} |   {ways[1]} |    {kept}".rstrip())
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "    -" if share is None else f"{100 * share:5.1f}"


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="a run's output directory, or that of a saved model")
    parser.add_argument("--onnx", action="store_true", required=True, help="the format, of which there is one so far")
    parser.add_argument(
        "--truncate_dim",
        "--truncate-dim",
        type=int,
        help="numbers of an embedding (default: all; users can cut those)",
    )
    parser.add_argument(
        "--output", type=Path, help="directory of the export (default: OUTPUT_DIR/onnx); one is replaced"
    )
    parser.add_argument(
        "--parquet", help="pairs to measure recall on (default: val_parquet of OUTPUT_DIR/config.yaml)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
