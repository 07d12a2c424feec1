"""What a parquet file of 2 GB costs in memory and time once `datasets` has converted it.

    python benchmarks/memory.py

20,000 rows of about 100 kB, in row groups of 100: a noisy JPEG, behind it random bytes that no decoder reads and no
compression shrinks. Conversion, start-up, first batch and random access are each measured in a process of their own,
without its imports. The file and its conversion, 4 GB, lie in the directory for temporary files, and in the page cache
if that is large enough. Prints one JSON line each.
"""

import argparse
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import REPEATS, alternate, peak_memory, report, seconds  # noqa: E402

ROWS, ROWS_PER_GROUP, BYTES_PER_ROW = 20_000, 100, 100_000
BATCH_SIZE, WORKERS, IMAGE_SIZE = 64, 2, 224
ACCESSES = {"ours": 2000, "row groups": 40}  # rows of one repeat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--parquet", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part](options.parquet)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.parquet"
        write_parquet(path)
        size = path.stat().st_size / 1e6
        conversion = measure("conversion", path)
        start_up, batch = (medians(part, path) for part in ("start-up", "first batch"))
        access = measure("random access", path)
    file = {"file_mb": round(size), "rows": ROWS, "rows_per_group": ROWS_PER_GROUP}
    for kind in ("anonymous", "resident"):
        report(
            f"memory/start-up, {kind}",
            ours=start_up[kind],
            peer=size,
            unit="MB",
            peer_is="the file",
            ratio=start_up[kind] / size,
            bound="<= 300 MB",
            bounded=start_up[kind],
            start_up_s=round(start_up["seconds"], 3),
            conversion_s=round(conversion["seconds"], 1),
            conversion_peak_mb=round(conversion["peak"]),
            **file,
        )
    report(
        f"memory/first batch of {BATCH_SIZE}, {WORKERS} workers",
        ours=batch["seconds"],
        peer=conversion["seconds"],
        unit="s",
        peer_is="the conversion",
        ratio=batch["seconds"] / conversion["seconds"],
        bound="<= 5 s",
        bounded=batch["seconds"],
        **file,
    )
    report(
        "memory/random access",
        ours=access["ours"],
        peer=access["row groups"],
        unit="rows/s",
        peer_is="read_row_group for each row",
        ratio=access["ours"] / access["row groups"],
        bound=">= 5",
        **file,
    )


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    generator = np.random.default_rng(0)
    pictures = [noisy_jpeg(generator) for _ in range(8)]
    schema = pyarrow.schema({"image_bytes": pyarrow.binary(), "caption": pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for start in range(0, ROWS, ROWS_PER_GROUP):
            rows = range(start, start + ROWS_PER_GROUP)
            images = [pictures[i % 8] + generator.bytes(BYTES_PER_ROW - len(pictures[i % 8])) for i in rows]
            captions = [f"noise number {i}, in many colours" for i in rows]
            writer.write_table(pyarrow.table({"image_bytes": images, "caption": captions}, schema=schema))


def noisy_jpeg(generator: np.random.Generator) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 255, (256, 256, 3), dtype=np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()


def medians(part: str, path: Path) -> dict[str, float]:
    """Of what a part measures, over several processes."""
    measured = [measure(part, path) for _ in range(REPEATS)]
    return {key: statistics.median(values[key] for values in measured) for key in measured[0]}


def measure(part: str, path: Path) -> dict[str, float]:
    """A part in a process of its own, whose cache lies beside the file."""
    command = [sys.executable, __file__, "--part", part, "--parquet", str(path)]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(path.parent / "cache"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def convert(parquet: str) -> dict[str, float]:
    open_dataset = opener(parquet)
    taken: list[float] = []
    return {"peak": peak_memory(lambda: taken.append(seconds(open_dataset))) / 1e6, "seconds": taken[0]}


def start(parquet: str) -> dict[str, float]:
    """Memory of opening the file and of telling it from others, as a run does; beyond that of the imports."""
    open_dataset, opened = opener(parquet), []

    def start_up() -> None:
        opened.append(open_dataset())
        opened[0].pairs.fingerprint  # noqa: B018 - reads the files

    before = resident()
    taken = seconds(start_up)
    return {kind: value - before[kind] for kind, value in resident().items()} | {"seconds": taken}


def load_batch(parquet: str) -> dict[str, float]:
    from torch.utils.data import DataLoader

    open_dataset = opener(parquet)

    def first_batch() -> None:
        loader = DataLoader(open_dataset(), BATCH_SIZE, shuffle=True, num_workers=WORKERS, collate_fn=list)
        items = next(iter(loader))
        if len(items) != BATCH_SIZE or any(item["bad_samples"] for item in items):
            raise SystemExit("the batch is not whole")

    return {"seconds": seconds(first_batch)}


def access_at_random(parquet: str) -> dict[str, float]:
    """Rows per second, of rows that are drawn anew in each repeat."""
    import pyarrow.parquet

    pairs, rng = opener(parquet)().pairs, random.Random(0)
    reader = pyarrow.parquet.ParquetFile(parquet)

    def read_group(index: int) -> None:
        group = reader.read_row_group(index // ROWS_PER_GROUP)
        group.slice(index % ROWS_PER_GROUP, 1).to_pylist()

    def read(rows: int, read_one: Callable[[int], object]) -> None:
        for index in rng.choices(range(ROWS), k=rows):
            read_one(index)

    taken = alternate(
        {
            "ours": lambda: read(ACCESSES["ours"], pairs.__getitem__),
            "row groups": lambda: read(ACCESSES["row groups"], read_group),
        }
    )
    return {name: rows / taken[name] for name, rows in ACCESSES.items()}


def opener(parquet: str):  # type: ignore[no-untyped-def]
    """What opens the dataset, its imports done."""
    from training.data import PixmoParquetImageTextDataset
    from training.transforms import get_image_transforms

    return lambda: PixmoParquetImageTextDataset(parquet, get_image_transforms(IMAGE_SIZE))


def resident() -> dict[str, float]:
    """MB of this process: all, and those that are no pages of files, which the system cannot drop; Linux alone."""
    status = Path("/proc/self/status").read_text()
    fields = {"resident": "VmRSS", "anonymous": "RssAnon"}
    return {kind: int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) * 1024 / 1e6 for kind, name in fields.items()}


PARTS: dict[str, Callable[[str], dict[str, float]]] = {
    "conversion": convert,
    "start-up": start,
    "first batch": load_batch,
    "random access": access_at_random,
}

if __name__ == "__main__":
    main()
