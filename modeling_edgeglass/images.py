"""Pictures of any kind as plain RGB, the same in training and in use."""

import math
from collections.abc import Callable
from typing import cast

from PIL import ExifTags, Image, ImageMath, ImageOps

# What is opened: files of pixels. Of the others that Pillow knows, EPS starts Ghostscript, FITS and ICNS unpack
# without a limit, and the header of an ICO tells nothing of the picture inside.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")

_STRIP_PIXELS = 1 << 20  # converted at once, so that the steps between need no memory of the picture's size

# One channel of more than 8 bits: 16-bit grey PNG and TIFF, 32-bit integers, floats.
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture upright, opaque and in mode RGB.

    EXIF orientation is applied; what is transparent lies on white; palettes and CMYK are converted; grey of
    16 bits is scaled from 0..65535, wider integers and floats from their own range; of an animation the current
    frame is taken, which is the first unless somebody moved it.

    Raises:
        ValueError: A value is NaN or infinite.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    convert = _grey_scale(image) if image.mode in _DEEP_MODES else _on_white
    width, height = image.size
    rgb = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        box = (0, top, width, min(height, top + rows))
        rgb.paste(convert(image.crop(box)), box)
    return rgb


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey_scale(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """How one channel of more than 8 bits becomes grey, from the range of the whole picture."""
    lowest, highest = cast(tuple[float, float], image.getextrema())
    if not math.isfinite(highest - lowest):
        raise ValueError("a pixel is NaN or infinite")
    if image.mode != "F" and lowest >= 0 and highest <= 65535:
        lowest, highest = 0.0, 65535.0
    scale = 255.0 / max(highest - lowest, 1e-12)

    def convert(part: Image.Image) -> Image.Image:
        # The extrema pass NaN over, unless it is the first value.
        if _where_equal(part, part).getextrema() != (255, 255):
            raise ValueError("a pixel is NaN or infinite")
        grey = part.convert("F").point(lambda value: value * scale - lowest * scale).convert("L")
        if "transparency" in part.info:  # that value becomes white
            grey.paste(255, mask=_where_equal(part, part.info["transparency"]))
        return grey.convert("RGB")

    return convert


def _where_equal(image: Image.Image, other: Image.Image | int) -> Image.Image:
    """255 where the values of two pictures, or a picture and a number, are equal, else 0; in mode L."""
    plain = [part.convert("F") if isinstance(part, Image.Image) else part for part in (image, other)]
    return ImageMath.lambda_eval(
        lambda names: names["convert"]((names["a"] == names["b"]) * 255, "L"), a=plain[0], b=plain[1]
    )
