"""From the bytes of a picture file to RGB, whatever a stranger put into them."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile

from modeling_edgeglass.images import FORMATS, to_rgb

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

# EXIF orientations (Exif 2.32, tag 0x0112): of a picture turned upright, the x axis runs against the stored axis
# that it comes from, the y axis does, and x comes from the stored y.
_AGAINST_X, _AGAINST_Y, _SWAPPED = (2, 3, 6, 7), (3, 4, 7, 8), (5, 6, 7, 8)


class UndecodableImageError(ValueError):
    """The bytes are no picture that can be read, or one that is too large."""


def decode_image(data: bytes, max_pixels: int = 40_000_000) -> Image.Image:
    """Decode a picture file as upright RGB on white; of an animation the first frame.

    Args:
        data: Content of a JPEG, PNG, WebP, GIF, TIFF, BMP or another file of `FORMATS`.
        max_pixels: Width times height that is still decoded; a small file can unpack to gigabytes. Decoding takes up
            to 25 bytes per pixel (JPEG 2000; WebP 18, most formats 4 to 10), so that the default keeps within 1 GB.

    Raises:
        UndecodableImageError: Says why.
    """
    return _decode(_open(data, max_pixels))


def decode_for_crop(
    data: bytes, choose_box: Callable[[tuple[int, int]], Box], min_side: int, max_pixels: int = 40_000_000
) -> tuple[Image.Image, Box]:
    """Decode a picture file as `decode_image` does, but a JPEG no larger than a crop of it needs.

    JPEG keeps the cosine transforms of blocks of 8 x 8 pixels. A decoder can make 4 x 4, 2 x 2 or 1 x 1 pixels of a
    block instead (libjpeg's `scale_denom`), which is less work and a good part of the resizing. The smallest
    picture is made in which either side of the crop has `min_side` pixels. Other files are decoded in full.

    Args:
        data: Content of a picture file.
        choose_box: The crop, given the full upright size (width, height).
        min_side: Pixels that either side of the crop keeps, unless it has fewer to begin with.
        max_pixels: Width times height, of the full size, that is still decoded.

    Returns:
        The picture, and the crop in pixels of this picture.

    Raises:
        UndecodableImageError: Says why.
    """
    image = _open(data, max_pixels)
    if not isinstance(image, JpegImageFile):  # some of their decoders turn pictures upright, and change the size
        rgb = _decode(image)
        return rgb, choose_box(rgb.size)
    orientation = _orientation(image)
    width, height = image.size[::-1] if orientation in _SWAPPED else image.size
    left, top, right, bottom = choose_box((width, height))
    shorter = min(right - left, bottom - top)
    factor = next((factor for factor in (8, 4, 2) if shorter >= factor * min_side), 1)
    # Pillow takes the largest factor that keeps this size, which is ours. Its own mode: CMYK stays CMYK.
    image.draft(image.mode, (image.width // factor, image.height // factor))
    rgb = _decode(image)
    # The size is rounded up, by a part of a pixel behind the end of a stored axis: before the start, if reversed.
    x = rgb.width - width / factor if orientation in _AGAINST_X else 0.0
    y = rgb.height - height / factor if orientation in _AGAINST_Y else 0.0
    return rgb, (left / factor + x, top / factor + y, right / factor + x, bottom / factor + y)


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever Pillow raises as `UndecodableImageError`, and nothing of what it warns of."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Pillow repairs, and of sizes, which are checked here
            yield
    except UndecodableImageError:
        raise
    except UnidentifiedImageError as error:  # its message is the address of our buffer
        raise UndecodableImageError("in no format that is read") from error
    except Exception as error:  # Pillow's plugins let anything through: struct.error, KeyError, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UndecodableImageError(reason) from error


@_explained()
def _open(data: bytes, max_pixels: int) -> ImageFile:
    """The header of a picture file that is not too large."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if not 0 < width * height <= max_pixels:
        raise UndecodableImageError(f"{width} x {height} pixels, where {max_pixels} are the limit")
    return image


@_explained()
def _orientation(image: ImageFile) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


@_explained()
def _decode(image: ImageFile) -> Image.Image:
    with image:
        image.load()
        return to_rgb(image)
