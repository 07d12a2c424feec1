"""Pictures of any kind as plain RGB, the same in training and in use."""

from typing import cast

from PIL import Image, ImageOps

# One channel of more than 8 bits: 16-bit grey PNG and TIFF, 32-bit integers, floats.
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture upright, opaque and in mode RGB.

    EXIF orientation is applied; what is transparent lies on white; palettes and CMYK are converted; grey of
    16 bits is scaled from 0..65535, floats from their own range; of an animation the current frame is taken,
    which is the first unless somebody moved it.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in _DEEP_MODES:
        lowest, highest = cast(tuple[float, float], image.getextrema()) if image.mode == "F" else (0.0, 65535.0)
        scale = 255.0 / max(highest - lowest, 1e-12)
        return image.convert("F").point(lambda value: value * scale - lowest * scale).convert("L").convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
