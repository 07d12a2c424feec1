"""From the bytes of a picture file to RGB."""

import io

from PIL import Image

from modeling_edgeglass.images import to_rgb


def decode_image(data: bytes) -> Image.Image:
    """Decode a picture file as upright RGB on white; of an animation the first frame.

    Raises:
        OSError, ValueError, SyntaxError: Pillow cannot read it.
    """
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return to_rgb(image)
