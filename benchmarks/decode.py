"""Pictures per second and core, from the bytes of a JPEG to normalised pixels, beside the usual way.

    python benchmarks/decode.py

Ours decodes a JPEG no larger than its crop needs and resizes the crop alone. The usual way decodes it in full, resizes
it and crops. The photographs are the two of scikit-learn (640 x 427), side by side and in rows until the size is
reached, enlarged before by 1.6, and saved with quality 90 and 4:2:0 chroma. One thread; the time is that of the
processor, which other programs on the machine do not change. Prints one JSON line per measurement; `psnr_db` and
`mean_abs_difference` (of 0..255) compare our pixels with those of the same crop of the fully decoded picture.
"""

import argparse
import io
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import alternate, report
from training.images import decode_image
from training.transforms import JITTER, get_image_transforms, load_pixels, random_box

IMAGE_SIZE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
NUM_PICTURES = 8  # of each size
ENLARGED = 1.6  # a photograph of many pixels has less detail per pixel than a small one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    for size, bound in (((640, 480), 1.3), ((1024, 768), 1.8), ((2048, 1536), 2.5)):
        compare(size, is_training=False, bound=f">= {bound}")
        compare(size, is_training=True, bound=">= 1")


def compare(size: tuple[int, int], *, is_training: bool, bound: str) -> None:
    """Measure both ways on the same pictures, with the same crops."""
    files = [photograph(size, seed) for seed in range(NUM_PICTURES)]
    transform = get_image_transforms(IMAGE_SIZE, is_training, image_mean=MEAN, image_std=STD)
    usual = usual_training if is_training else usual_evaluation

    def rate(load: Callable[[bytes, random.Random], Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: [load(data, random.Random(seed)) for seed, data in enumerate(files)]

    ours = rate(lambda data, rng: load_pixels(data, transform, rng))
    in_full = rate(lambda data, rng: transform(decode_image(data), rng))
    taken = alternate({"ours": ours, "peer": rate(usual)}, measure=cpu_seconds)
    difference = (torch.stack(ours()) - torch.stack(in_full())) * torch.tensor(STD)[:, None, None] * 255
    width, height = size
    report(
        f"decode/{'training' if is_training else 'evaluation'}, {width} x {height}",
        ours=NUM_PICTURES / taken["ours"],
        peer=NUM_PICTURES / taken["peer"],
        unit="pictures per second of one core",
        peer_is="open, convert to RGB, resize bicubic, crop, normalise" + (", the same crop and jitter" * is_training),
        ratio=taken["peer"] / taken["ours"],
        bound=bound,
        psnr_db=round(20 * math.log10(255) - 10 * math.log10(difference.square().mean().item()), 1),
        mean_abs_difference=round(difference.abs().mean().item(), 2),
        bytes_per_pixel=round(sum(map(len, files)) / NUM_PICTURES / width / height, 2),
        image_size=IMAGE_SIZE,
        threads=1,
    )


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def usual_evaluation(data: bytes, rng: random.Random) -> Tensor:
    """Shorter edge to `IMAGE_SIZE`, centre crop, as in torchvision."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    short = min(width, height)
    image = image.resize((IMAGE_SIZE * width // short, IMAGE_SIZE * height // short), Image.Resampling.BICUBIC)
    left, top = (image.width - IMAGE_SIZE) // 2, (image.height - IMAGE_SIZE) // 2
    return normalise(image.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)))


def usual_training(data: bytes, rng: random.Random) -> Tensor:
    """Random resized crop and colour jitter, as in torchvision, of the crop that ours takes."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top, right, bottom = random_box(image.size, rng)
    image = image.crop((round(left), round(top), round(right), round(bottom)))  # torchvision's are whole pixels
    image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    return normalise(image)


def normalise(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def photograph(size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of photographs side by side, another part of them for every seed."""
    rng = random.Random(seed)
    photographs = []
    for pixels in load_sample_images().images:
        image = Image.fromarray(pixels)
        enlarged = (round(ENLARGED * image.width), round(ENLARGED * image.height))
        photographs.append(image.resize(enlarged, Image.Resampling.BICUBIC))
    tile_width, tile_height = photographs[0].size
    left, top = rng.randrange(tile_width), rng.randrange(tile_height)
    picture = Image.new("RGB", size)
    for row, y in enumerate(range(-top, size[1], tile_height)):
        for column, x in enumerate(range(-left, size[0], tile_width)):
            picture.paste(photographs[(row + column + seed) % 2], (x, y))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90, subsampling="4:2:0")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
