"""EdgeGlassProcessor: pictures and captions as a model wants them."""

import os
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedConfig, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessingKwargs
from transformers.utils import logging

from .backbones import backbone_config, longest_text
from .distributed import rank
from .image_processing_edgeglass import EdgeGlassImageProcessor
from .images import FORMATS, to_rgb

logger = logging.get_logger(__name__)

# Tokens, where nothing limits them: transformers' own 10^30 is no size that Python can count to.
_NO_LIMIT = 2**31 - 1


class EdgeGlassProcessorKwargs(ProcessingKwargs, total=False):
    """Captions are padded to the longest of the batch and cut to the length that the tokenizer knows."""

    _defaults = {  # type: ignore[misc]  # noqa: RUF012 - transformers' own form
        "text_kwargs": {"padding": True, "truncation": True},
        "common_kwargs": {"return_tensors": "pt"},
    }


class EdgeGlassProcessor(ProcessorMixin):
    """An image processor and a tokenizer in one: `processor(images=..., text=...)` gives a model's inputs.

    Pictures go the way of `training`'s evaluation, with the vision backbone's own mean and standard deviation.

    Args:
        image_processor: An `EdgeGlassImageProcessor`.
        tokenizer: Its `model_max_length` is the longest caption, in tokens.
    """

    valid_processor_kwargs = EdgeGlassProcessorKwargs

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            # What a text tower takes: pipelines hand a model all that its tokenizer gives.
            tokenizer.model_input_names = ["input_ids", "attention_mask"]
            tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # is what gets saved
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Inputs of `EdgeGlassModel`: `pixel_values` (B, 3, S, S), `input_ids` and `attention_mask` (B, L).

        Args:
            images: One picture or a list of them: of any Pillow mode, paths of picture files, or arrays and
                tensors with values in 0..255.
            text: One caption or a list of them.
            **kwargs: As for any transformers processor, such as `return_tensors="np"`.
        """
        images = [_opened(image) for image in images] if isinstance(images, list | tuple) else _opened(images)
        return super().__call__(images=images, text=text, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As for any processor.

        Raises:
            ValueError: The directory or repository has no tokenizer.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:
            if "backend tokenizer" not in str(error):  # transformers' words for a missing file
                raise
            raise ValueError(f"{pretrained_model_name_or_path} has no tokenizer.json") from error

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        *,
        image_size: int | None = None,
        max_text_length: int | None = None,
        max_positions: int | None = None,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        vision_trust_remote_code: bool = False,
        text_trust_remote_code: bool = False,
    ) -> "EdgeGlassProcessor":
        """Join the image processor and the tokenizer of two pretrained backbones.

        Args:
            vision: Model id or directory of the vision backbone.
            text: Model id or directory of the text backbone.
            image_size: Side S of the square input in pixels; None takes the backbone's own.
            max_text_length: Longest caption in tokens; None takes as many as the text backbone has positions and
                its tokenizer allows.
            max_positions: Tokens that the text backbone has positions for; None asks its config.
            vision_revision: Commit, tag or branch on the Hub.
            text_revision: Commit, tag or branch on the Hub.
            vision_trust_remote_code: Run processor code that comes with the vision checkpoint.
            text_trust_remote_code: Run tokenizer code that comes with the text checkpoint.

        Raises:
            ValueError: The vision backbone has no preprocessor config, or the text backbone no tokenizer.
        """
        vision_hub = {"revision": vision_revision, "trust_remote_code": vision_trust_remote_code}
        text_hub = {"revision": text_revision, "trust_remote_code": text_trust_remote_code}
        try:
            backbone_processor = AutoImageProcessor.from_pretrained(vision, **vision_hub)
        except OSError as error:
            raise ValueError(
                f"vision tower {vision!r} has no preprocessor_config.json: mean and std unknown"
            ) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(text, **text_hub)
        except (OSError, ValueError) as error:
            raise ValueError(f"text tower {text!r} has no tokenizer") from error
        if image_size is None:
            config = backbone_config(AutoConfig.from_pretrained(vision, **vision_hub), "vision")
            image_size = _own_image_size(config, backbone_processor)
        image_processor = EdgeGlassImageProcessor(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            resample=backbone_processor.resample,
            image_mean=backbone_processor.image_mean,
            image_std=backbone_processor.image_std,
        )
        if tokenizer.pad_token is None:  # causal models often have none; the attention mask hides it
            tokenizer.pad_token = tokenizer.eos_token
        if max_positions is None:
            max_positions = longest_text(backbone_config(AutoConfig.from_pretrained(text, **text_hub), "text"))
        tokenizer.model_max_length = _text_length(text, tokenizer.model_max_length, max_positions, max_text_length)
        return cls(image_processor, tokenizer)


def _text_length(text: str, tokenizer_limit: int, positions: int | None, wanted: int | None) -> int:
    """Tokens of the longest caption: as many as are wanted, unless the tokenizer or the positions allow less."""
    limit = min(tokenizer_limit, positions or _NO_LIMIT, _NO_LIMIT)
    if wanted is None or wanted <= limit:
        return wanted or limit
    reason = f"{text} has positions for" if limit == positions else f"the tokenizer of {text} allows"
    if rank() == 0:
        logger.warning(f"max_text_length {wanted} is cut to the {limit} tokens that {reason}")
    return limit


def _opened(image: Any) -> Any:
    """The picture in a file; what is no path of one as it is."""
    if isinstance(image, str | os.PathLike) and os.path.isfile(image):
        with Image.open(image, formats=FORMATS) as opened:
            return to_rgb(opened)
    return image


def _own_image_size(config: PreTrainedConfig, image_processor: Any) -> int:
    """Side of the pictures that a vision backbone was trained on, in pixels."""
    size = config.to_dict().get("image_size")  # convolutional backbones need not have one
    if size is None:
        size = image_processor.size.get("shortest_edge") or image_processor.size["height"]
    return int(size[0] if isinstance(size, list | tuple) else size)
