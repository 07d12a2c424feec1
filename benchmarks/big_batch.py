"""What a batch of 4096 pairs takes in chunks of 64, beside a batch of 64 at once.

    python benchmarks/big_batch.py

The demo's real towers: the picture tower trains, at 32 pixels; of the captions kept features are pooled. Each side is
one training step of `EdgeGlassModel` in a process of its own. Memory is the peak of resident memory above what was
there before the step, less the batch, its embeddings and their gradients, which grow with any batch. glibc is told to
give back at once what is freed, so that resident is what is in use. Prints one JSON line.
"""

import argparse
import gc
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import alternate, in_fresh_process, peak_memory, report  # noqa: E402

SMALL, LARGE = 64, 4096
IMAGE_SIZE, TOKENS, DIMENSION = 32, 4, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        print(memory_of_step(options.step))
        return
    medians = alternate(
        {size: partial(in_fresh_process, __file__, "--step", size) for size in (SMALL, LARGE)},
        measure=lambda run: run(),
        warm_up=False,
    )
    small, large = medians[SMALL], medians[LARGE]
    report(
        f"big batch/memory, B={LARGE} in chunks of {SMALL}",
        ours=large,
        peer=small,
        unit="MB",
        peer_is=f"B={SMALL} at once",
        ratio=large / small,
        bound="<= 1.5",
        image_size=IMAGE_SIZE,
        tokens=TOKENS,
    )


def memory_of_step(batch_size: int) -> float:
    """MB of one step, beyond what any batch of that size takes."""
    import torch

    from modeling_edgeglass import EdgeGlassModel

    torch.manual_seed(0)
    towers = ROOT / "examples" / "towers"
    model = EdgeGlassModel.from_vision_text_pretrained(
        str(towers / "efficientnet-lite0"),
        str(towers / "all-minilm-l6-v2"),
        vision_freeze=False,
        sample_single_mrl_dim=False,
    ).train()
    # What a chunk alone decides is not measured twice: the batch norms take the statistics they have.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()

    def step(size: int) -> None:
        model(
            torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE),
            text_features=torch.randn(size, TOKENS, model.text_encoder.hidden_size),
            return_loss=True,
            tower_chunk_size=SMALL if size > SMALL else None,
        ).loss.backward()

    step(4)  # gradients of the weights are there from now on
    gc.collect()
    grown = peak_memory(lambda: step(batch_size))
    batch = batch_size * 4 * (3 * IMAGE_SIZE**2 + TOKENS * model.text_encoder.hidden_size)
    embeddings = 2 * 2 * batch_size * 4 * DIMENSION  # both sides, and their gradients
    return (grown - batch - embeddings) / 1e6


if __name__ == "__main__":
    main()
