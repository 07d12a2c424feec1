"""Retrieval of a saved model on any parquet file: the table that a run ends with, and its numbers as JSON.

    python -m training.evaluate outputs/demo/model examples/data/emoji_test.parquet

This is how a test set is touched: once, after every choice was made on val.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from training.errors import ConfigError, DataError, UserError


def main() -> None:
    try:
        evaluate(parse_options())
    except UserError as error:
        sys.exit(f"error: {error}")


def evaluate(options: argparse.Namespace) -> None:
    # As in run_alignment.py, --help does not wait for torch.
    from training.arguments import build_evaluation_arguments
    from training.build import image_transforms, load_model
    from training.cpu import prepare_cpu
    from training.data import PixmoParquetImageTextDataset
    from training.history import logged_names
    from training.results import save_metrics
    from training.tables import recall_table
    from training.trainer import AlignmentTrainer

    if options.batch_size < 2:
        raise ConfigError(f"--batch-size: a loss needs two pairs or more, got {options.batch_size}")
    split = options.split or Path(options.parquet[0]).stem
    model, processor = load_model(options.model)
    dataset = PixmoParquetImageTextDataset(
        options.parquet,
        image_transforms(processor, is_training=False),
        processor.tokenizer.model_max_length,
        for_evaluation=True,
        image_column=options.image_column,
        caption_column=options.caption_column,
    )
    if len(dataset) < 2:
        raise DataError(f"{', '.join(options.parquet)}: one pair is no set to evaluate: retrieval needs two or more")
    with tempfile.TemporaryDirectory() as unused_output_dir:
        args = build_evaluation_arguments(unused_output_dir, options.batch_size)
        prepare_cpu(args)
        trainer = AlignmentTrainer(model, args, processing_class=processor, eval_dataset=dataset, visualize=False)
        metrics = logged_names(trainer.evaluate())
    metrics = {name.replace("val/", f"{split}/"): value for name, value in metrics.items()}
    if args.should_save:
        beside_model = Path(options.model).parent if Path(options.model).is_dir() else Path()
        output = options.output or beside_model / f"{split}_metrics.json"
        print(recall_table(metrics, (model.config.projection_dim, *model.config.mrl_dimensions), split))
        save_metrics(metrics, output)
        print(f"metrics: {output}")
    trainer.accelerator.end_training()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub id of a saved EdgeGlass model with its processor")
    parser.add_argument("parquet", nargs="+", help="parquet files or globs, read as one set")
    parser.add_argument("--output", type=Path, help="JSON file (default: SPLIT_metrics.json beside the model)")
    parser.add_argument("--split", help="what the names of the numbers begin with (default: PARQUET's name)")
    parser.add_argument("--batch-size", type=int, default=64, help="pairs per batch; the loss depends on it (64)")
    parser.add_argument("--image-column", help="column of the pictures (default: found by name)")
    parser.add_argument("--caption-column", help="column of the captions (default: found by name)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
