"""Pictures of any kind as plain RGB, the same in training and in use."""

import math
from typing import cast

from PIL import Image, ImageMath, ImageOps

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
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:
        return _deep_to_grey(image).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_to_grey(image: Image.Image) -> Image.Image:
    """One channel of more than 8 bits as mode L; its transparent value becomes white."""
    lowest, highest = cast(tuple[float, float], image.getextrema())
    # The extrema pass NaN over, unless it is the first value.
    if not (math.isfinite(highest - lowest) and _where_equal(image, image).getextrema() == (255, 255)):
        raise ValueError("a pixel is NaN or infinite")
    if image.mode != "F" and lowest >= 0 and highest <= 65535:
        lowest, highest = 0.0, 65535.0
    scale = 255.0 / max(highest - lowest, 1e-12)
    grey = image.convert("F").point(lambda value: value * scale - lowest * scale).convert("L")
    if "transparency" in image.info:
        grey.paste(255, mask=_where_equal(image, image.info["transparency"]))
    return grey


def _where_equal(image: Image.Image, other: Image.Image | int) -> Image.Image:
    """255 where the values of two pictures, or a picture and a number, are equal, else 0; in mode L."""
    plain = [part.convert("F") if isinstance(part, Image.Image) else part for part in (image, other)]
    return ImageMath.lambda_eval(
        lambda names: names["convert"]((names["a"] == names["b"]) * 255, "L"), a=plain[0], b=plain[1]
    )
