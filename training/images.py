"""From the bytes of a picture file to RGB, whatever a stranger put into them."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from modeling_edgeglass.images import FORMATS, to_rgb


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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Pillow repairs, and of sizes, which are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if not 0 < width * height <= max_pixels:
                    raise UndecodableImageError(f"{width} x {height} pixels, where {max_pixels} are the limit")
                image.load()
                return to_rgb(image)
    except UndecodableImageError:
        raise
    except UnidentifiedImageError as error:  # its message is the address of our buffer
        raise UndecodableImageError("in no format that is read") from error
    except Exception as error:  # Pillow's plugins let anything through: struct.error, KeyError, zlib.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UndecodableImageError(reason) from error
