import math
import random
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from modeling_edgeglass import EdgeGlassProcessor
from tests.test_images import encode, turned
from training.build import image_transforms
from training.data import PixmoParquetImageTextDataset
from training.images import decode_image
from training.transforms import (
    CROP_RATIO,
    CROP_SCALE,
    ImageTransform,
    center_box,
    get_image_transforms,
    load_pixels,
    random_box,
)

SIZES = [(64, 64), (64, 48), (48, 64), (100, 37), (31, 200), (224, 224), (640, 427), (33, 32), (1, 50)]


def noise(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def smooth(size: tuple[int, int]) -> Image.Image:
    x, y = np.meshgrid(*(np.linspace(0, 6, length) for length in size))
    channels = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(x - 2 * y)], axis=-1)
    return Image.fromarray((127.5 + 100 * channels).astype(np.uint8))


def psnr(a: torch.Tensor, b: torch.Tensor, transform: ImageTransform) -> float:
    """Likeness of two results of `transform` in dB; 45 dB is a difference of 1.4 levels of 255 (root mean square)."""
    difference = (a - b) * torch.tensor(transform.image_std)[:, None, None]  # of pixels in 0..1
    return -10 * math.log10(max(difference.square().mean().item(), 1e-12))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("image_size", [32, 96])
def test_evaluation_sees_the_pixels_of_the_processor_but_for_rounding_to_8_bits(
    size, image_size, vision_dir, text_dir
):
    processor = EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir, image_size=image_size)
    transform = image_transforms(processor, is_training=False)
    picture = smooth(size)  # of noise, Pillow's two passes clip overshoots, and which one is first depends on the box
    expected = processor(images=picture)["pixel_values"][0]
    one_level = 1 / 255 / min(processor.image_processor.image_std)
    difference = (transform(picture, random.Random()) - expected).abs()
    assert difference.max() < 1.01 * one_level
    assert difference.mean() < 0.2 * one_level


def test_a_training_view_is_a_function_of_the_generator():
    transform, picture = get_image_transforms(32), noise((60, 40))
    assert torch.equal(transform(picture, random.Random(1)), transform(picture, random.Random(1)))
    assert not torch.equal(transform(picture, random.Random(1)), transform(picture, random.Random(2)))


def test_pixels_are_normalised_by_mean_and_std():
    transform = get_image_transforms(8, is_training=False, image_mean=(0.5, 0.25, 0.0), image_std=(0.5, 0.25, 2.0))
    pixels = transform(Image.new("RGB", (8, 8), (255, 255, 255)), random.Random())
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor([1.0, 3.0, 0.5]))


@pytest.mark.parametrize("size", SIZES)
def test_crops_stay_within_the_picture_and_keep_scale_and_aspect(size: tuple[int, int]):
    rng = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = random_box(size, rng)
        assert 0 <= left < right <= size[0] + 1e-9
        assert 0 <= top < bottom <= size[1] + 1e-9
        ratio = (right - left) / (bottom - top)
        assert CROP_RATIO[0] - 1e-9 <= ratio <= CROP_RATIO[1] + 1e-9
        if max(size) / min(size) < 1.3:
            assert (right - left) * (bottom - top) >= CROP_SCALE[0] * size[0] * size[1] - 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_the_centre_box_is_centred_and_square(size: tuple[int, int]):
    left, top, right, bottom = center_box(size, 32)
    pixel = min(size) / 32  # of the resized picture
    assert abs(left - (size[0] - right)) <= 1.1 * pixel
    assert abs(top - (size[1] - bottom)) <= 1.1 * pixel
    assert right - left == pytest.approx(min(size), rel=0.05)


def test_pictures_are_not_mirrored_unless_asked():
    picture = Image.new("RGB", (40, 40), "white")
    picture.paste((0, 0, 0), (0, 0, 20, 40))
    views = [get_image_transforms(32)(picture, random.Random(seed)) for seed in range(50)]
    assert all(view[:, :, :10].mean() < view[:, :, -10:].mean() for view in views)
    always = get_image_transforms(32, horizontal_flip_prob=1.0)
    assert always(picture, random.Random(0))[:, :, :10].mean() > always(picture, random.Random(0))[:, :, -10:].mean()
    evaluation = get_image_transforms(32, is_training=False, horizontal_flip_prob=1.0)
    assert evaluation(picture, random.Random(0))[:, :, :10].mean() < 0


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_size", [16, 30, 80, 150])  # an eighth, a quarter, half and all of the JPEG's pixels
def test_a_scaled_jpeg_gives_the_pixels_of_the_full_upright_one(orientation: int, image_size: int):
    upright = smooth((203, 331))  # no multiple of 8 on either side
    stored, exif = turned(upright, orientation)
    data = encode(stored, "JPEG", quality=95, exif=exif)
    for transform in (get_image_transforms(image_size), get_image_transforms(image_size, is_training=False)):
        pixels = load_pixels(data, transform, random.Random(1))
        assert psnr(pixels, transform(upright, random.Random(1)), transform) > 45


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_of_every_kind_are_scaled_alike(mode: str, options: dict):
    data = encode(smooth((203, 331)).convert(mode), "JPEG", quality=95, **options)
    transform = get_image_transforms(30)
    pixels, full = load_pixels(data, transform, random.Random(1)), transform(decode_image(data), random.Random(1))
    assert psnr(pixels, full, transform) > 45


def test_of_a_jpeg_with_several_pictures_the_first_is_taken():
    data = encode(smooth((203, 331)), "MPO", save_all=True, append_images=[noise((203, 331))], quality=95)
    transform = get_image_transforms(30)
    assert (
        psnr(
            load_pixels(data, transform, random.Random(1)), transform(smooth((203, 331)), random.Random(1)), transform
        )
        > 45
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "GIF", "JPEG2000"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_of_other_formats_every_bit_is_as_from_the_full_picture(mode: str, format: str, orientation: int):
    stored, exif = turned(noise((70, 41)).convert(mode), orientation)
    data = encode(stored, format, **({"exif": exif} if format in ("PNG", "WEBP", "TIFF") else {}))
    for transform in (get_image_transforms(16), get_image_transforms(16, is_training=False)):
        full = transform(decode_image(data), random.Random(1))
        assert torch.equal(load_pixels(data, transform, random.Random(1)), full)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_loading_draws_what_the_transform_draws(format: str):
    data, transform = encode(smooth((203, 331)), format), get_image_transforms(16)
    ours, usual = random.Random(1), random.Random(1)
    load_pixels(data, transform, ours)
    transform(decode_image(data), usual)
    assert ours.getstate() == usual.getstate()


def test_any_other_transform_gets_the_full_picture():
    data = encode(smooth((203, 331)), "JPEG")
    pixels = load_pixels(data, lambda image, rng: torch.tensor([*image.size, rng.random()]), random.Random(1))
    torch.testing.assert_close(pixels, torch.tensor([203, 331, random.Random(1).random()]))


def test_a_dataset_loads_jpegs_scaled(tmp_path: Path):
    data, transform = encode(smooth((203, 331)), "JPEG"), get_image_transforms(16, is_training=False)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [data], "caption": ["waves"]}), path)
    image = PixmoParquetImageTextDataset(path, transform)[0]["image"]
    assert torch.equal(image, load_pixels(data, transform, random.Random()))
    assert not torch.equal(image, transform(decode_image(data), random.Random()))


@pytest.mark.parametrize("size", [(640, 427), (427, 640), (203, 331)])
def test_evaluation_of_a_jpeg_is_close_to_the_processor(size, vision_dir, text_dir):
    processor = EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir, image_size=32)
    transform, data = image_transforms(processor, is_training=False), encode(smooth(size), "JPEG", quality=95)
    expected = processor(images=decode_image(data))["pixel_values"][0]
    assert psnr(load_pixels(data, transform, random.Random()), expected, transform) > 45


def test_pixels_are_normalised_as_by_the_plain_formula_bit_by_bit():
    transform, picture = get_image_transforms(32, is_training=False), noise((32, 32))
    plain = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(transform.image_mean), torch.tensor(transform.image_std)
    assert torch.equal(transform(picture, random.Random()), (plain - mean[:, None, None]) / std[:, None, None])
