"""From a picture to `pixel_values`, on Pillow alone."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from training.images import Box, decode_for_crop, decode_image

Transform = Callable[[Image.Image, random.Random], Tensor]

# Share of the picture's area and aspect ratio of a training crop. Long captions name what is at the rim, so a
# crop keeps nearly everything; CLIP (arXiv:2103.00020, sec. 2.4) keeps 0.9 to 1 with one-line captions.
CROP_SCALE = (0.8, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = 0.1  # brightness, contrast and saturation are scaled by 1 - JITTER to 1 + JITTER


@dataclass(frozen=True)
class ImageTransform:
    """Crop, resize, jitter and normalise a picture.

    Args:
        image_size: Side S of the result in pixels.
        is_training: Random crop and mild colour jitter; else the centre crop of `EdgeGlassProcessor`.
        image_mean: Per channel, of values in 0..1.
        image_std: Per channel, of values in 0..1.
        resample: Pillow's resampling filter.
        horizontal_flip_prob: 0..1, in training alone. Zero by default: captions say left and right.
    """

    image_size: int
    is_training: bool
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    resample: int
    horizontal_flip_prob: float

    def __call__(self, image: Image.Image, rng: random.Random) -> Tensor:
        """Transform an RGB picture into float32 (3, S, S); every random draw comes from `rng`."""
        return self.cut(image, self.choose_box(image.size, rng), rng)

    def choose_box(self, size: tuple[int, int], rng: random.Random) -> Box:
        """The part of a picture (width, height) that is cut out; draws from `rng` before `cut` does."""
        return random_box(size, rng) if self.is_training else center_box(size, self.image_size)

    def cut(self, image: Image.Image, box: Box, rng: random.Random) -> Tensor:
        """Resize the `box` of an RGB picture, jitter and normalise: float32 (3, S, S)."""
        size = (self.image_size, self.image_size)
        image = image.resize(size, Image.Resampling(self.resample), box=box)
        if self.is_training:
            image = jitter_color(image, rng)
            if rng.random() < self.horizontal_flip_prob:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float()  # (3, S, S), 0..255
        mean, std = torch.tensor(self.image_mean), torch.tensor(self.image_std)
        return pixels.div_(255).sub_(mean[:, None, None]).div_(std[:, None, None])


def load_pixels(data: bytes, transform: Transform, rng: random.Random, max_pixels: int = 40_000_000) -> Tensor:
    """Decode and transform a picture file.

    For an `ImageTransform` a JPEG is decoded no larger than its crop needs. The crop and all other draws are those of
    `transform(decode_image(data), rng)`, and so are the pixels, but for what one scaling in two steps differs from
    one step: about one of 255 levels on photographs. Other formats give the very same pixels.

    Args:
        data: Content of a picture file.
        transform: An `ImageTransform`, or any function of an RGB picture and a `random.Random`.
        rng: Of this sample and epoch.
        max_pixels: Width times height, of the full size, that is still decoded.

    Raises:
        UndecodableImageError: Says why.
    """
    if not isinstance(transform, ImageTransform):
        return transform(decode_image(data, max_pixels), rng)
    image, box = decode_for_crop(data, lambda size: transform.choose_box(size, rng), transform.image_size, max_pixels)
    return transform.cut(image, box, rng)


def get_image_transforms(
    image_size: int = 224,
    is_training: bool = True,
    *,
    image_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
    image_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    resample: int = Image.Resampling.BICUBIC,
    horizontal_flip_prob: float = 0.0,
) -> ImageTransform:
    """The transform of training pictures, or of evaluation pictures.

    Args:
        image_size: Side of the square result in pixels.
        is_training: Random resized crop and mild colour jitter; else resize and centre crop.
        image_mean: Per channel, of values in 0..1; CLIP's by default, the vision backbone's own in a run.
        image_std: Likewise.
        resample: Pillow's resampling filter.
        horizontal_flip_prob: 0..1, in training alone. Zero by default: captions say left and right.

    Returns:
        A function of an RGB picture and a `random.Random` that gives float32 (3, image_size, image_size).
    """
    return ImageTransform(
        image_size, is_training, tuple(image_mean), tuple(image_std), int(resample), horizontal_flip_prob
    )


def center_box(size: tuple[int, int], image_size: int) -> Box:
    """The part of a picture (width, height) that is left when its shorter edge is resized and its centre cropped.

    In the numbers of CLIP's image processor: one resize of this box gives its pixels, to a rounding of 8 bits,
    and never makes the whole resized picture, which is huge where one edge is much longer than the other.
    """
    width, height = size
    short = min(size)
    resized_width = image_size if width == short else int(image_size * width / short)
    resized_height = image_size if height == short else int(image_size * height / short)
    left, top = (resized_width - image_size) // 2, (resized_height - image_size) // 2
    x, y = width / resized_width, height / resized_height
    return left * x, top * y, (left + image_size) * x, (top + image_size) * y


def random_box(size: tuple[int, int], rng: random.Random) -> Box:
    """A random part of a picture (width, height): area within `CROP_SCALE`, aspect within `CROP_RATIO`.

    The random resized crop of Szegedy et al. (arXiv:1409.4842, sec. 6), in its usual form: ten tries, then the
    largest centred part that is not longer or taller than `CROP_RATIO` allows.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(*map(math.log, CROP_RATIO)))
        crop_width, crop_height = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if crop_width <= width and crop_height <= height:
            left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = min(width, height * CROP_RATIO[1]), min(height, width / CROP_RATIO[0])
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def jitter_color(image: Image.Image, rng: random.Random) -> Image.Image:
    """Scale brightness, contrast and saturation, each by its own factor near one."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    return image
