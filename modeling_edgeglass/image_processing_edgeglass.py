"""EdgeGlassImageProcessor: pictures of any kind as a vision tower wants them."""

from typing import Any

from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .images import to_rgb


class EdgeGlassImageProcessor(CLIPImageProcessorPil):
    """Upright RGB on white, shorter edge to the model's size, centre crop, mean and standard deviation.

    The steps of CLIP, always by Pillow: where torchvision is installed, transformers would resize with that.
    """

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """Values (H, W, 3) of a picture of any Pillow mode; arrays as transformers takes them."""
        plain: Any = to_rgb(image) if isinstance(image, Image.Image) else image
        return super().convert_to_rgb(plain, input_data_format)
