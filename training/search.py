"""Embed the pictures of a folder or a parquet file, and search them by a sentence or a picture.

    python -m training.search build outputs/demo/model examples/data/emoji_val.parquet outputs/emoji_index
    python -m training.search find outputs/emoji_index "a horse" --top 5
    python -m training.search find outputs/emoji_index picture.png --truncate_dim 128

Prints a line per item that is found, the best first: its cosine and what it is.
"""

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from training.errors import ConfigError, DataError, UserError, printable

logger = logging.getLogger(__name__)


def main() -> None:
    options = parse_options()
    try:
        build(options) if options.command == "build" else find(options)
    except UserError as error:
        sys.exit(f"error: {error}")


def build(options: argparse.Namespace) -> None:
    """Embed all pictures of a source into an index."""
    # As in run_alignment.py, --help does not wait for torch.
    from training.arguments import build_evaluation_arguments
    from training.cpu import prepare_cpu
    from training.index_files import check_new

    if options.batch_size < 1:
        raise ConfigError(f"--batch-size: must be 1 or more, got {options.batch_size}")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction: must be in 0..1, got {options.max_bad_fraction}")
    check_new(options.index)
    prepare_cpu(build_evaluation_arguments(str(options.index.parent), options.batch_size))
    model, processor = load_for_search(options.model)
    name = str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model
    how = {key: getattr(options, key) for key in ("batch_size", "max_bad_fraction", "dtype")}
    index, num_skipped = build_index(model, processor, options.source, options.index, name=name, **how)
    print(f"{options.index}: {len(index)} pictures" + (f", {num_skipped} skipped, see above" if num_skipped else ""))


def build_index(
    model: Any,
    processor: Any,
    source: str,
    folder: Path,
    *,
    name: str = "",
    batch_size: int = 64,
    max_bad_fraction: float = 0.05,
    dtype: str = "float32",
) -> tuple[Any, int]:
    """Embed the pictures of a folder or of parquet files into an `EdgeGlassIndex`.

    Args:
        model: The alignment.
        processor: Its processor.
        source: Folder of pictures, parquet file or glob.
        folder: Of the index; it must not be there yet.
        name: Directory or id of the model, for those who search.
        batch_size: Pictures embedded at once.
        max_bad_fraction: 0..1, more pictures that cannot be read are an error.
        dtype: Of the embeddings on disk, float32 or float16.

    Returns:
        The index, and how many pictures could not be read.

    Raises:
        ConfigError: The folder exists.
        DataError: There are no pictures, or too many cannot be read.
        OutputError: The disk is full, or the folder cannot be written.
    """
    from training.build import image_transforms
    from training.identity import weights_checksum
    from training.index import EdgeGlassIndex
    from training.pictures import open_pictures

    pictures = open_pictures(source, image_transforms(processor, is_training=False))
    index = EdgeGlassIndex.build(
        folder,
        embedded(model, pictures, batch_size, max_bad_fraction),
        sizes=funnel_sizes(model.config.projection_dim, model.config.mrl_dimensions),
        model=name,
        weights=weights_checksum(model.trained_state_dict()),
        dtype=dtype,
    )
    return index, len(pictures) - len(index)


def find(options: argparse.Namespace) -> None:
    """Print what an index holds that is most similar to a sentence or a picture."""
    from training.index import EdgeGlassIndex

    index = EdgeGlassIndex(options.index)
    if options.top < 1:
        raise ConfigError(f"--top: must be 1 or more, got {options.top}")
    if options.truncate_dim is not None and not 0 < options.truncate_dim <= index.sizes[-1]:
        raise ConfigError(f"--truncate_dim: embeddings have {index.sizes[-1]} numbers, got {options.truncate_dim}")

    from training.identity import weights_checksum  # torch, which nothing above waits for

    name = options.model or index.model
    try:
        model, processor = load_for_search(name)
    except ConfigError as error:
        if options.model:
            raise
        raise ConfigError(f"{printable(str(error), 400)}; the index names it, --model names another") from error
    name = printable(name, 200)
    if model.config.projection_dim != index.sizes[-1]:
        raise ConfigError(
            f"{name}: makes embeddings of {model.config.projection_dim} numbers, those of {options.index} have "
            f"{index.sizes[-1]}; --model names the model that made them, which was {printable(index.model, 200)}"
        )
    if weights_checksum(model.trained_state_dict()) != index.weights:
        raise ConfigError(
            f"{name}: its weights are not those that {options.index} was made with: build the index anew, or name "
            "the model that made it with --model"
        )
    query = embed_query(model, processor, options.query)
    found = index.search(query, options.top, truncate_dim=options.truncate_dim, exact=options.exact)
    for score, item in zip(found.scores[0], index.items(found.positions[0]), strict=True):
        print(f"{score:.4f}  {printable(str(item), 1000)}")


def load_for_search(name: str) -> tuple[Any, Any]:
    """A model on the accelerator, if there is one, and its processor.

    Raises:
        ConfigError: There is none, or it cannot be read.
    """
    import torch

    from training.build import load_model

    model, processor = load_model(name)
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        model.to(device)  # type: ignore[arg-type]
    return model, processor


def embedded(
    model: Any, pictures: Any, batch_size: int, max_bad_fraction: float
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """Embeddings (B, D) and items of all pictures that can be read; of others the file and the reason are told.

    Raises:
        DataError: More than `max_bad_fraction` of them cannot be read.
    """
    import torch
    from torch.utils.data import DataLoader
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    # Beside a model on the CPU there is no core to spare; an accelerator would wait for one that decodes.
    num_workers = 0 if model.device.type == "cpu" else min(8, len(pictures) // batch_size)
    loader = DataLoader(pictures, batch_size, num_workers=num_workers, collate_fn=list)
    num_bad = 0
    with logging_redirect_tqdm(), tqdm(total=len(pictures), desc="embed", unit="picture") as bar:
        for batch in loader:
            for picture in batch:
                if picture.defect is not None:
                    num_bad += 1
                    logger.warning("%s: %s", printable(str(picture.item), 1000), picture.defect)
            if num_bad > max_bad_fraction * len(pictures):
                raise DataError(
                    f"{num_bad} of {len(pictures)} pictures cannot be read, the last is "
                    f"{printable(str([p for p in batch if p.defect][-1].item), 200)}; --max-bad-fraction, which is "
                    f"{max_bad_fraction:g}, allows more"
                )
            if good := [picture for picture in batch if picture.defect is None]:
                pixel_values = torch.stack([picture.pixels for picture in good]).to(model.device)
                with torch.inference_mode():
                    embeds = model.get_image_features(pixel_values)
                yield embeds.cpu().numpy(), [picture.item for picture in good]
            bar.update(len(batch))


def embed_query(model: Any, processor: Any, query: str) -> Any:
    """The embedding (1, D) of a picture, where `query` is a file, or of a sentence.

    Raises:
        ConfigError: There is nothing in it.
        DataError: It is a picture that cannot be read, or is not there.
    """
    import torch

    from training.batches import tokenize
    from training.build import image_transforms
    from training.data import cut_words
    from training.pictures import load_picture

    if not query.strip():
        raise ConfigError("the query is empty: give a sentence or a picture file")
    with torch.inference_mode():
        if not is_picture(query):
            text = cut_words(query, processor.tokenizer.model_max_length)
            inputs = {name: ids.to(model.device) for name, ids in tokenize(processor.tokenizer, [text]).items()}
            return model.get_text_features(**inputs).cpu().numpy()
        try:
            pixels = load_picture(Path(query), image_transforms(processor, is_training=False))
        except DataError as error:
            raise DataError(f"{printable(query, 200)}: {error}") from error
        return model.get_image_features(pixels.unsqueeze(0).to(model.device)).cpu().numpy()


def is_picture(query: str) -> bool:
    """Whether a query names a file, or is one word with a picture's suffix, whose file is missing then."""
    from training.pictures import picture_suffixes

    return os.path.isfile(query) or (len(query.split()) == 1 and Path(query).suffix.lower() in picture_suffixes())


def funnel_sizes(D: int, mrl_dimensions: Sequence[int]) -> tuple[int, ...]:  # noqa: N803
    """Of the sizes that a model was trained at: the largest up to 128 and up to 512, and the whole."""
    trained = [*mrl_dimensions, D]
    return tuple(sorted({max((size for size in trained if size <= limit), default=D) for limit in (128, 512)} | {D}))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="embed pictures into a new index")
    build.add_argument("model", help="directory or Hub id of a saved EdgeGlass model with its processor")
    build.add_argument("source", help="folder of pictures, with the folders in it; or a parquet file or glob")
    build.add_argument("index", type=Path, help="folder to be made")
    build.add_argument("--batch-size", "--batch_size", type=int, default=64, help="pictures embedded at once (64)")
    build.add_argument(
        "--dtype", default="float32", choices=("float32", "float16"), help="of the embeddings on disk (float32)"
    )
    build.add_argument(
        "--max-bad-fraction",
        "--max_bad_fraction",
        type=float,
        default=0.05,
        help="0..1, more bad pictures are an error (0.05)",
    )
    find = commands.add_parser("find", help="search an index")
    find.add_argument("index", type=Path, help="folder that build made")
    find.add_argument("query", help="a sentence, or the file of a picture")
    find.add_argument("--model", help="directory or Hub id in the place of the one that the index names")
    find.add_argument("--top", type=int, default=10, help="items to print (10)")
    find.add_argument(
        "--truncate_dim", "--truncate-dim", type=int, help="numbers of the embeddings that are compared (default: all)"
    )
    find.add_argument("--exact", action="store_true", help="compare with every item, not through the funnel")
    return parser.parse_args()


if __name__ == "__main__":
    main()
