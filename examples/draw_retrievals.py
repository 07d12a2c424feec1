"""Draw what a model finds: captions of a parquet file, and the five pictures nearest to each.

    python examples/draw_retrievals.py outputs/demo/model examples/data/emoji_val.parquet docs/retrievals.png

The picture that a caption belongs to is framed. The captions are a random draw (`--seed`), not a choice.
"""

import argparse
import io
import random
from collections.abc import Sequence

import datasets
import torch
from PIL import Image, ImageDraw, ImageFont

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from modeling_edgeglass.images import to_rgb

TILE, GAP, TEXT_WIDTH = 96, 8, 250  # pixels
FRAME = (0, 114, 178)  # blue of the Okabe-Ito palette, made for colour-blind people too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("parquet", help="with the columns image_bytes and caption")
    parser.add_argument("output", help="PNG file")
    parser.add_argument("--queries", type=int, default=6, help="captions drawn (6)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (0)")
    options = parser.parse_args()

    model = EdgeGlassModel.from_pretrained(options.model)
    processor = EdgeGlassProcessor.from_pretrained(options.model)
    rows = datasets.Dataset.from_parquet(options.parquet)
    pictures = [to_rgb(Image.open(io.BytesIO(data))) for data in rows["image_bytes"]]
    queries = random.Random(options.seed).sample(range(len(rows)), options.queries)
    captions = [rows[i]["caption"] for i in queries]
    with torch.no_grad():
        batches = [processor(images=pictures[i : i + 32]) for i in range(0, len(pictures), 32)]
        image_embeds = torch.cat([model.get_image_features(**batch) for batch in batches])
        text_embeds = model.get_text_features(**processor(text=captions))
    nearest = (text_embeds @ image_embeds.T).topk(5, dim=1).indices.tolist()
    draw(queries, captions, nearest, pictures).save(options.output)


def draw(
    queries: Sequence[int], captions: Sequence[str], nearest: Sequence[Sequence[int]], pictures: Sequence[Image.Image]
) -> Image.Image:
    """One row per caption: its words, then the pictures found, the best first."""
    step = TILE + GAP
    sheet = Image.new("RGB", (TEXT_WIDTH + 5 * step + GAP, len(queries) * step + GAP), "white")
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for row, (query, caption, found) in enumerate(zip(queries, captions, nearest, strict=True)):
        top = GAP + row * step
        canvas.multiline_text((GAP, top + 6), wrap(caption, width=32), fill="black", font=font)
        for column, index in enumerate(found):
            left = TEXT_WIDTH + column * step
            sheet.paste(pictures[index].resize((TILE, TILE)), (left, top))
            if index == query:
                canvas.rectangle((left - 3, top - 3, left + TILE + 2, top + TILE + 2), outline=FRAME, width=4)
    return sheet


def wrap(caption: str, width: int) -> str:
    """The caption in at most four lines of about `width` letters."""
    lines = [""]
    for word in caption.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines[:4]) + (" ..." if len(lines) > 4 else "")


if __name__ == "__main__":
    main()
