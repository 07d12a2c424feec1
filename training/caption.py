"""Say what is on a picture, from its embedding.

    python -m training.caption outputs/demo_decoding/model picture.png --truncate_dim 128 --num_candidates 8

Prints a line per picture. With --num_candidates K sentences are drawn, embedded again by the text tower of the
alignment, and the one that is nearest to the picture is kept.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from training.errors import ConfigError, UserError, printable


def main() -> None:
    options = parse_options()
    try:
        sys.exit(caption(options))
    except UserError as error:
        sys.exit(f"error: {error}")


def caption(options: argparse.Namespace) -> int:
    """Describe one picture after the other; returns 1 where one of them cannot be read, and 0 else."""
    # As in run_alignment.py, --help does not wait for torch.
    import torch
    from transformers import set_seed

    from training.decoding.build import load_decoder
    from training.images import UndecodableImageError, decode_image

    for name in ("num_candidates", "truncate_dim"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: must be 1 or more, got {value}")
    loading = ("alignment", "language_model", "load_in_4bit", "language_trust_remote_code")
    model, processor = load_decoder(options.model, **{name: getattr(options, name) for name in loading})
    full = model.config.sizes[0]
    if options.truncate_dim is not None and options.truncate_dim > full:
        raise ConfigError(f"--truncate_dim: embeddings have {full} numbers, got {options.truncate_dim}")
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        model.to(device)  # type: ignore[arg-type]
    status = 0
    for path in options.pictures:
        try:
            picture = decode_image(path.read_bytes())
        except (OSError, UndecodableImageError) as error:
            print(f"error: {path}: no readable picture: {printable(str(error), 200)}", file=sys.stderr)
            status = 1
            continue
        set_seed(options.seed)  # what is said of a picture does not depend on those before it
        print(f"{path}: {one_line(model, processor, picture, options)}", flush=True)
    return status


def one_line(model: Any, processor: Any, picture: Any, options: argparse.Namespace) -> str:
    """What is on a picture, in one line without control codes, which a terminal would obey."""
    from training.decoding.describing import nearest_text, say

    prompt = processor.prompt if options.prompt is None else options.prompt
    pixel_values = processor(images=picture)["pixel_values"].to(model.device)
    image_embeds = model.alignment.get_image_features(pixel_values)
    size = options.truncate_dim
    texts = say(model, processor, [prompt], image_embeds, size, num_candidates=options.num_candidates)
    if len(texts) > 1:
        texts = [nearest_text(model.alignment, processor, image_embeds, texts, size)]
    return "".join(character for character in " ".join(texts[0].split()) if character.isprintable())


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or Hub id of a trained decoder, whole or the bridge alone")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="picture", help="files of pictures")
    parser.add_argument("--prompt", help="what is asked (default: what the bridge was trained with)")
    parser.add_argument("--truncate_dim", type=int, help="numbers of the embedding that are read (default: all)")
    parser.add_argument("--num_candidates", type=int, default=1, help="sentences to choose from (1: the likeliest)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of candidates (0)")
    parser.add_argument("--alignment", help="directory or id in the place of the one that the bridge names")
    parser.add_argument("--language_model", help="likewise")
    parser.add_argument("--language_trust_remote_code", action="store_true", help="run code that comes with it")
    parser.add_argument("--load_in_4bit", action="store_true", help="keep the language model in 4 bits, on a GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
