"""Cosines of a picture with some texts, by onnxruntime, Pillow and tokenizers alone.

    python examples/onnx_without_torch.py outputs/demo/onnx picture.png "a horse" "a yellow circle"

The directory is what `python -m training.export` wrote; its files with `_int8` in their name are used alike.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

if len(sys.argv) < 4:
    sys.exit(__doc__)
folder, picture, texts = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
settings = json.loads((folder / "export.json").read_text())["image"]
side = settings["size"]  # pixels

image = ImageOps.exif_transpose(Image.open(picture)).convert("RGBA")
image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
width, height = (side * edge // min(image.size) for edge in image.size)
left, top = (width - side) // 2, (height - side) // 2
image = image.resize((width, height), settings["resample"]).crop((left, top, left + side, top + side))
pixels = (np.asarray(image, np.float32) / 255 - np.float32(settings["mean"])) / np.float32(settings["std"])

tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
input_ids, attention_mask = ([getattr(text, name) for text in tokens] for name in ("ids", "attention_mask"))

encoders = {name: onnxruntime.InferenceSession(folder / f"{name}_encoder.onnx") for name in ("image", "text")}
(image_embeds,) = encoders["image"].run(None, {"pixel_values": pixels.transpose(2, 0, 1)[None]})
(text_embeds,) = encoders["text"].run(None, {"input_ids": input_ids, "attention_mask": attention_mask})
for text, cosine in zip(texts, text_embeds @ image_embeds[0], strict=True):
    print(f"{cosine:.4f}  {text}")
