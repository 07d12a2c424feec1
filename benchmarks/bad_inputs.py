"""Feed damaged pictures and files to the data path, and count what becomes of them.

    python benchmarks/bad_inputs.py

Pictures of six formats are truncated, get flipped bits, zeroed blocks, swapped headers and random tails; parquet
files get the same; one picture is an EPS. Every picture is a row of one file that is read as in training, every file
is opened and read whole, each in a process that is given 20 seconds. Prints one JSON line per kind: read, replaced (or
refused with a DataError), crashed, hung.
"""

import argparse
import io
import json
import multiprocessing
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from training.data import PixmoParquetImageTextDataset
from training.errors import DataError
from training.transforms import get_image_transforms

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
SECONDS = 20  # for one picture or file
# A program for Ghostscript that never ends: it is not to be started.
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n%%EOF\n"


def truncate(data: bytearray, rng: random.Random) -> bytearray:
    return data[: rng.randrange(len(data))]


def flip_bits(data: bytearray, rng: random.Random) -> bytearray:
    for _ in range(rng.randrange(1, 40)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def zero_a_block(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randrange(1, 400))
    data[start:end] = bytes(end - start)
    return data


def damage_header(data: bytearray, rng: random.Random) -> bytearray:
    for position in rng.sample(range(min(64, len(data))), 6):
        data[position] = rng.randrange(256)
    return data


def swap_tail(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    return data[:start] + rng.randbytes(len(data) - start)


DAMAGES: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    truncate,
    flip_bits,
    zero_a_block,
    damage_header,
    swap_tail,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-kind", type=int, default=20, help="damaged copies per format and damage (20)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for format in FORMATS:
            original = make_picture(format)
            damaged = [bytes(damage(bytearray(original), rng)) for damage in DAMAGES for _ in range(options.per_kind)]
            total += report(format, count(read_pictures, write_pictures(Path(folder), format, damaged), len(damaged)))
        total += report("EPS", count(read_pictures, write_pictures(Path(folder), "EPS", [EPS]), 1))
        intact = write_pictures(Path(folder), "intact", [make_picture("PNG")] * 50).read_bytes()
        for number in range(options.per_kind * len(DAMAGES)):
            path = Path(folder) / f"damaged-{number}.parquet"
            path.write_bytes(DAMAGES[number % len(DAMAGES)](bytearray(intact), rng))
        files = sorted(Path(folder).glob("damaged-*.parquet"))
        total += report("parquet", sum((count(read_file, path, 1) for path in files), Counter()))
    report("all", total)


def make_picture(format: str) -> bytes:
    """A picture with both smooth and noisy parts."""
    pixels = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    pixels[:48] = np.linspace(0, 255, 96, dtype=np.uint8)[None, :, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format)
    return buffer.getvalue()


def write_pictures(folder: Path, name: str, pictures: list[bytes]) -> Path:
    """The pictures, and behind them as many intact ones to stand in for the bad."""
    pictures = [*pictures, *[make_picture("PNG")] * len(pictures)]
    captions = [f"picture {i}" for i in range(len(pictures))]
    path = folder / f"{name}.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": pictures, "caption": captions}), path)
    return path


def read_pictures(path: Path, index: int) -> str:
    item = PixmoParquetImageTextDataset(path, get_image_transforms(64))[index]
    return "replaced" if item["bad_samples"] else "read"


def read_file(path: Path, index: int) -> str:
    try:
        dataset = PixmoParquetImageTextDataset(path, get_image_transforms(64))
        for row in range(len(dataset)):
            dataset[row]
    except DataError:
        return "refused"
    return "read"


def count(read: Callable[[Path, int], str], path: Path, number: int) -> Counter[str]:
    """What becomes of each, read in a process of its own that may die or hang."""
    outcomes: Counter[str] = Counter()
    done = 0
    while done < number:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.Process(target=read_all, args=(read, path, range(done, number), sender))
        process.start()
        sender.close()
        while done < number:
            if not receiver.poll(SECONDS):
                outcomes["hung"] += 1
                done += 1
                break
            try:
                outcomes[receiver.recv()] += 1
                done += 1
            except EOFError:  # the process died
                outcomes["crashed"] += 1
                done += 1
                break
        process.kill()
        process.join()
    return outcomes


def read_all(read: Callable[[Path, int], str], path: Path, indices: range, sender) -> None:  # type: ignore[no-untyped-def]
    import datasets

    datasets.disable_progress_bars()
    for index in indices:
        try:
            outcome = read(path, index)
        except Exception as error:  # what the benchmark looks for
            print(f"{path.name} {index}: {type(error).__name__}: {error}", file=sys.stderr)
            outcome = "crashed"
        sender.send(outcome)


def report(kind: str, outcomes: Counter[str]) -> Counter[str]:
    names = ("read", "replaced", "refused", "crashed", "hung")
    print(
        json.dumps({"kind": kind, "inputs": outcomes.total()} | {name: outcomes[name] for name in names}), flush=True
    )
    return outcomes


if __name__ == "__main__":
    main()
