import random

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_edgeglass import EdgeGlassProcessor
from training.build import image_transforms
from training.transforms import CROP_RATIO, CROP_SCALE, center_box, get_image_transforms, random_box

SIZES = [(64, 64), (64, 48), (48, 64), (100, 37), (31, 200), (224, 224), (640, 427), (33, 32), (1, 50)]


def noise(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def smooth(size: tuple[int, int]) -> Image.Image:
    x, y = np.meshgrid(*(np.linspace(0, 6, length) for length in size))
    channels = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(x - 2 * y)], axis=-1)
    return Image.fromarray((127.5 + 100 * channels).astype(np.uint8))


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
