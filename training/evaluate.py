"""A saved model on any parquet file: the table that a run ends with, and its numbers as JSON.

    python -m training.evaluate outputs/demo/model examples/data/emoji_test.parquet

Of an alignment retrieval is measured, of a language model that reads embeddings what it says of pictures.

This is how a test set is touched: once, after every choice was made on val.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.errors import ConfigError, DataError, UserError


def main() -> None:
    try:
        evaluate(parse_options())
    except UserError as error:
        sys.exit(f"error: {error}")


def evaluate(options: argparse.Namespace) -> None:
    # As in run_alignment.py, --help does not wait for torch.
    from transformers import PreTrainedConfig

    from training.arguments import build_evaluation_arguments
    from training.cpu import prepare_cpu
    from training.files import weights_fingerprint
    from training.history import logged_names
    from training.results import save_metrics
    from training.run import leave

    if options.batch_size < 2:
        raise ConfigError(f"--batch-size: a loss needs two pairs or more, got {options.batch_size}")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction: must be in 0..1, got {options.max_bad_fraction}")
    if options.num_scored < 0:
        raise ConfigError(f"--num-scored: must be 0 or more, got {options.num_scored}")
    split = options.split or split_name(options.parquet[0])
    beside_model = Path(options.model).parent if Path(options.model).is_dir() else Path()
    output = options.output or beside_model / f"{split}_metrics.json"
    check_writable(output)
    args = build_evaluation_arguments(str(output.parent), options.batch_size)
    prepare_cpu(args)
    try:
        kind = PreTrainedConfig.get_config_dict(options.model)[0].get("model_type")
    except (OSError, ValueError):
        kind = None  # and loading says what is wrong
    make = make_decoding_trainer if kind == "edgeglass_decoding" else make_alignment_trainer
    trainer, describe = make(options, args)
    if len(trainer.eval_dataset) < 2:
        raise DataError(f"{', '.join(options.parquet)}: one pair is no set to evaluate: retrieval needs two or more")
    try:
        metrics = logged_names(trainer.evaluate())
    except ValueError as error:
        if "NaN" not in str(error):
            raise
        raise ConfigError(f"{options.model}: {error}") from error
    # An evaluation alone has no epoch.
    metrics = {f"{split}/{name[4:]}": value for name, value in metrics.items() if name.startswith("val/")}
    if args.should_save:
        print(describe(metrics, split))
        # So that nobody takes them for those of another model in the same place.
        weights = {"weights": weights_fingerprint(Path(options.model))} if Path(options.model).is_dir() else {}
        save_metrics(metrics | weights, output)
        print(f"metrics: {output}")
    leave(trainer)


def make_alignment_trainer(options: argparse.Namespace, args: Any) -> tuple[Any, Callable[..., str]]:
    """What evaluates an alignment, and its metrics and split as text."""
    from training.build import image_transforms, load_model
    from training.data import PixmoParquetImageTextDataset
    from training.tables import recall_table
    from training.trainer import AlignmentTrainer

    model, processor = load_model(options.model)
    dataset = PixmoParquetImageTextDataset(
        options.parquet,
        image_transforms(processor, is_training=False),
        processor.tokenizer.model_max_length,
        for_evaluation=True,
        image_column=options.image_column,
        caption_column=options.caption_column,
    )
    trainer = AlignmentTrainer(
        model,
        args,
        processing_class=processor,
        eval_dataset=dataset,
        max_bad_fraction=options.max_bad_fraction,
        visualize=False,
    )
    sizes = model.config.projection_dim, *model.config.mrl_dimensions
    return trainer, lambda metrics, split: recall_table(metrics, sizes, split)


def make_decoding_trainer(options: argparse.Namespace, args: Any) -> tuple[Any, Callable[..., str]]:
    """What evaluates a language model that reads embeddings, and its metrics and split as text."""
    from training.build import image_transforms
    from training.decoding.build import load_decoder
    from training.decoding.config import GenerationConfig
    from training.decoding.data import AnswersDataset
    from training.decoding.scores import check_scorers
    from training.decoding.trainer import DecodingTrainer
    from training.tables import description_table

    if options.num_scored:
        check_scorers()
    model, processor = load_decoder(options.model)
    dataset = AnswersDataset(
        options.parquet,
        image_transforms(processor.alignment_processor, is_training=False),
        processor.max_text_length,
        prompt=processor.prompt,
        for_evaluation=True,
        image_column=options.image_column,
        caption_column=options.caption_column,
    )
    trainer = DecodingTrainer(
        model,
        args,
        processing_class=processor,
        eval_dataset=dataset,
        generation=GenerationConfig(num_samples=0, num_scored=options.num_scored),
        visualize=False,
        max_bad_fraction=options.max_bad_fraction,
    )
    return trainer, lambda metrics, split: description_table(metrics, model.config.sizes, split)


def split_name(parquet: str) -> str:
    """What the numbers of a file are called: its name, of a glob what is no wildcard."""
    return re.sub(r"[^\w.-]+", "_", Path(parquet).stem).strip("_.-") or "test"


def check_writable(output: Path) -> None:
    """Find out before the set is encoded.

    Raises:
        ConfigError: Nothing can be written there.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror}); --output names another") from error
    if output.is_dir():
        raise ConfigError(f"{output}: is a directory; --output names a file")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub id of a saved EdgeGlass model with its processor")
    parser.add_argument("parquet", nargs="+", help="parquet files or globs, read as one set")
    parser.add_argument("--output", type=Path, help="JSON file (default: SPLIT_metrics.json beside the model)")
    parser.add_argument("--split", help="what the names of the numbers begin with (default: PARQUET's name)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per batch; the loss depends on it (64)")
    parser.add_argument("--max-bad-fraction", type=float, default=0.05, help="0..1, more bad rows are an error (0.05)")
    parser.add_argument("--image-column", help="column of the pictures (default: found by name)")
    parser.add_argument("--caption-column", help="column of the captions (default: found by name)")
    parser.add_argument("--num-scored", type=int, default=500, help="of a decoder: pictures to be described (500)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
