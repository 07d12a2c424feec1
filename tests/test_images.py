import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_edgeglass.images import FORMATS, to_rgb
from training.images import UndecodableImageError, decode_for_crop, decode_image


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def turned(upright: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """The picture as a camera stores it that is held otherwise, and the EXIF that says so."""
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    return (upright if method is None else upright.transpose(method)), exif


def test_transparent_pictures_lie_on_white():
    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 255)), "PNG")) == (255, 0, 0)
    assert pixel(encode(Image.new("LA", (4, 4), (0, 0)), "PNG")) == (255, 255, 255)
    red, green, blue = pixel(encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "WEBP", lossless=True))
    assert red == green == blue
    assert abs(red - 127) <= 1


def test_a_transparent_palette_colour_lies_on_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 255, 255, 0, 0])
    image.putpixel((1, 0), 1)
    data = encode(image, "PNG", transparency=0)
    assert pixel(data) == (255, 255, 255)
    assert pixel(data, x=1) == (255, 0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int):
    upright = Image.new("RGB", (6, 4), "white")
    upright.paste((255, 0, 0), (0, 0, 3, 2))
    stored, exif = turned(upright, orientation)
    assert np.array_equal(np.array(decode_image(encode(stored, "PNG", exif=exif))), np.array(upright))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_brightness(format: str):
    ramp = np.linspace(0, 65535, 16, dtype=np.uint16).reshape(4, 4)
    image = decode_image(encode(Image.fromarray(ramp), format))
    expected = np.round(ramp / 257)
    assert np.abs(np.array(image)[..., 0] - expected).max() <= 1


def test_a_transparent_16_bit_grey_lies_on_white():
    values = np.array([[0, 1000], [1001, 65535]], dtype=np.uint16)
    image = decode_image(encode(Image.fromarray(values), "PNG", transparency=1000))
    assert [image.getpixel((x, y))[0] for y in (0, 1) for x in (0, 1)] == [0, 255, 3, 255]


def test_integers_beyond_16_bits_fill_their_own_range():
    values = np.array([[0, 2**20, 2**21, 2**30]], dtype=np.int32)
    image = decode_image(encode(Image.fromarray(values), "TIFF"))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 0, 0, 255]
    image = decode_image(encode(Image.fromarray(values[:, :3]), "TIFF"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]
    within = decode_image(encode(Image.fromarray(np.array([[0, 257]], dtype=np.int32)), "TIFF"))
    assert within.getpixel((1, 0)) == (1, 1, 1)  # as 16 bits


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_float_that_is_no_number_makes_a_picture_undecodable(value: float, place: int):
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    values[0, place] = value
    with pytest.raises(UndecodableImageError, match="a pixel is NaN or infinite"):
        decode_image(encode(Image.fromarray(values), "TIFF"))


def test_float_pictures_fill_their_own_range():
    image = decode_image(encode(Image.fromarray(np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)), "TIFF"))
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 127, 255]


def test_cmyk_grey_and_bilevel_become_rgb():
    red, green, blue = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert red > 240
    assert green < 20
    assert blue < 20
    assert pixel(encode(Image.new("L", (4, 4), 77), "PNG")) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(format: str):
    first, second = Image.new("RGB", (4, 4), (255, 0, 0)), Image.new("RGB", (4, 4), (0, 0, 255))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(first, format, save_all=True, append_images=[second], duration=100, **options)
    assert pixel(data) == (255, 0, 0)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\0" * 100])
def test_a_broken_picture_is_an_error(damage):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    with pytest.raises((OSError, ValueError, SyntaxError)):
        decode_image(damage(encode(Image.fromarray(noise), "PNG")))


def numbered(mode: str) -> Image.Image:
    """A picture of 13 x 29 pixels of many values, some of them transparent."""
    image = Image.frombytes("RGBA", (13, 29), random.Random(mode).randbytes(13 * 29 * 4))
    if mode in ("I;16", "I", "F"):
        image = image.convert("L").convert("F").point(lambda value: value * 200 + 7).convert("I").convert(mode)
        if mode != "F":
            image.info["transparency"] = image.getpixel((0, 0))
        return image
    image = image.convert("RGB").convert(mode) if mode in ("P", "CMYK", "1") else image.convert(mode)
    if mode in ("P", "RGB", "L"):
        image.info["transparency"] = image.getpixel((0, 0))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB", "L", "1", "CMYK", "I;16", "I", "F"])
def test_strips_are_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch):
    whole = to_rgb(numbered(mode))
    monkeypatch.setattr("modeling_edgeglass.images._STRIP_PIXELS", 40)
    assert to_rgb(numbered(mode)).tobytes() == whole.tobytes()


def test_ghostscript_is_never_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    started = tmp_path / "started"
    script = tmp_path / "gs"
    script.write_text(f"#!/bin/sh\ntouch {started}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(UndecodableImageError, match="in no format that is read"):
        decode_image(eps)
    assert not started.exists()


def test_every_format_is_one_that_pillow_knows():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_is_decoded_in_the_smallest_size_that_its_crop_needs(orientation: int):
    rng = random.Random(orientation)
    for _ in range(60):
        width, height, min_side = rng.randint(1, 700), rng.randint(1, 700), rng.randint(1, 60)
        left, top = rng.uniform(0, width / 2), rng.uniform(0, height / 2)
        box = (left, top, rng.uniform(width / 2 + 0.1, width), rng.uniform(height / 2 + 0.1, height))
        stored, exif = turned(Image.new("RGB", (width, height)), orientation)
        sizes: list[tuple[int, int]] = []
        choose_box = lambda size, box=box, sizes=sizes: (sizes.append(size), box)[1]  # noqa: E731
        image, scaled = decode_for_crop(encode(stored, "JPEG", exif=exif), choose_box, min_side)
        assert sizes == [(width, height)]  # full and upright

        sides, scaled_sides = ([b[2] - b[0], b[3] - b[1]] for b in (box, scaled))
        factor = round(sides[0] / scaled_sides[0])
        assert factor in (1, 2, 4, 8)
        assert image.size == (-(-width // factor), -(-height // factor))
        assert scaled_sides == pytest.approx([side / factor for side in sides])
        assert factor == 1 or min(scaled_sides) >= min_side - 1e-6
        assert factor == 8 or min(scaled_sides) / 2 < min_side
        assert -1e-6 <= scaled[0] < scaled[2] <= image.width + 1e-6
        assert -1e-6 <= scaled[1] < scaled[3] <= image.height + 1e-6


@pytest.mark.parametrize("min_side", [1, 1000])
def test_a_truncated_jpeg_is_an_error_in_every_size(min_side: int):
    noise = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), "JPEG")
    decode_for_crop(data, lambda size: (0, 0, *size), min_side)
    for length in (len(data) // 2, len(data) - 200, 300):
        with pytest.raises(UndecodableImageError):
            decode_for_crop(data[:length], lambda size: (0, 0, *size), min_side)


def test_the_limit_is_on_the_full_size_of_a_jpeg():
    data = encode(Image.new("RGB", (80, 64)), "JPEG")
    assert decode_for_crop(data, lambda size: (0, 0, *size), 1, max_pixels=80 * 64)[0].size == (10, 8)
    with pytest.raises(UndecodableImageError, match="80 x 64 pixels, where 5119 are the limit"):
        decode_for_crop(data, lambda size: (0, 0, *size), 1, max_pixels=80 * 64 - 1)


def test_an_error_of_the_choice_of_a_crop_is_not_one_of_the_picture():
    def choose_box(size: tuple[int, int]) -> tuple[float, float, float, float]:
        raise KeyError("a bug")

    for format in ("JPEG", "PNG"):
        with pytest.raises(KeyError, match="a bug"):
            decode_for_crop(encode(Image.new("RGB", (8, 8)), format), choose_box, 1)
