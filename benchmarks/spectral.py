"""The closed form: rate and memory of its moments, the time to solve, and the time to a given R@1 beside the peer.

    python benchmarks/spectral.py

Synthetic pairs of 4,096 + 1,536 features, the widths of statistics pooling on CLIP ViT-L/14 and MiniLM. Then the
demo's emoji with both towers frozen and their features kept: seconds from kept features to the R@1 on val that
sentence-transformers' own losses reach at their best epoch, on the same pooled features. Needs the extra `bench`.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import REPEATS, alternate, in_fresh_process, peak_memory, report, seconds  # noqa: E402
from benchmarks.study import Cell, cell_config, make_trainer, train_peer  # noqa: E402
from training.config import load_config  # noqa: E402
from training.initialization import initialize  # noqa: E402
from training.moments import Moments  # noqa: E402
from training.spectral import PrincipalAxes, Setting, SpectralSolver  # noqa: E402

SIZE_X, SIZE_Y, PAIRS, ROWS = 4096, 1536, 200_000, 1024
RATE_PAIRS = 4 * ROWS
THREADS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.moments:
        print(peak_memory(lambda: add_pairs(Moments(SIZE_X, SIZE_Y), PAIRS)) / 1e6)
        return
    report_moments()
    report_solve()
    report_time_to_recall()


def synthetic_pairs() -> tuple[Tensor, Tensor]:
    """A batch of pairs that share a part."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(ROWS, size, generator=generator) for size in (SIZE_X, SIZE_Y))
    x[:, :SIZE_Y] += y
    return x, y


def add_pairs(moments: Moments, count: int) -> Moments:
    """So many pairs, a batch at a time."""
    x, y = synthetic_pairs()
    for _ in range(count // ROWS):
        moments.add(x, y)
    return moments.flush()


def report_moments() -> None:
    """Operations per second beside those of one large product of matrices, and peak memory."""
    moments, square = Moments(SIZE_X, SIZE_Y), torch.randn(SIZE_X, SIZE_X, dtype=torch.float64)
    medians = alternate({"moments": partial(add_pairs, moments, RATE_PAIRS), "product": lambda: square @ square})
    ours = 2 * RATE_PAIRS * (SIZE_X**2 + SIZE_Y**2 + SIZE_X * SIZE_Y) / medians["moments"] / 1e9
    peer = 2 * SIZE_X**3 / medians["product"] / 1e9
    conditions = {"features": [SIZE_X, SIZE_Y], "dtype": "float64", "threads": THREADS}
    report(
        "spectral/rate of moments",
        ours=ours,
        peer=peer,
        unit="GFLOP/s",
        peer_is=f"one product of {SIZE_X} x {SIZE_X} matrices",
        ratio=ours / peer,
        bound=">= 0.6",
        repeats=REPEATS,
        **conditions,
    )
    ours, peer = in_fresh_process(__file__, "--moments"), PAIRS * (SIZE_X + SIZE_Y) * 4 / 1e6
    report(
        f"spectral/memory of {PAIRS} pairs",
        ours=ours,
        peer=peer,
        unit="MB",
        peer_is="the features themselves, float32",
        ratio=ours / peer,
        bound="<= 2000 MB",
        bounded=ours,
        **conditions,
    )


def report_solve() -> None:
    """Seconds from moments to both projections."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8 * ROWS, size, generator=generator) for size in (SIZE_X, SIZE_Y))
    x[:, :SIZE_Y] += y
    moments = Moments(SIZE_X, SIZE_Y)
    moments.add(x, y)
    moments.flush()
    setting = Setting((SIZE_X, SIZE_Y), (1.0, 0.3), 1.0)
    peer = seconds(
        lambda: (PrincipalAxes.of(moments.mean_x, moments.xx), PrincipalAxes.of(moments.mean_y, moments.yy))
    )
    ours = seconds(lambda: SpectralSolver(moments).solve(setting))
    report(
        "spectral/solve",
        ours=ours,
        peer=peer,
        unit="s",
        peer_is="the two eigendecompositions alone",
        ratio=ours / peer,
        bound="<= 60 s",
        bounded=ours,
        features=[SIZE_X, SIZE_Y],
        threads=THREADS,
    )


def report_time_to_recall() -> None:
    """From kept features: the whole start, with its choice of ridge and power, beside the peer's best epoch."""
    cell = Cell("emoji", None, "statistics", "spectral", 1)
    demo = load_config(ROOT / "configs/demo.yaml")
    layers = [f"{side}.feature_layers={demo[side].feature_layers}" for side in ("vision_encoder", "text_encoder")]
    kept = ["dataset.cache=pooled", f"dataset.cache_dir={ROOT}/outputs/features"]
    config = cell_config(cell, ROOT / "examples/data", *layers, *kept)
    trainer = make_trainer(config, cell)
    epochs = train_peer(trainer, cell)
    ours = seconds(lambda: initialize(config, trainer))
    metrics = trainer.evaluate()
    for size, suffix in ((4096, ""), (128, "@128")):
        found = 50 * (metrics[f"eval_i2t_r1{suffix}"] + metrics[f"eval_t2i_r1{suffix}"])
        best = max(epochs, key=lambda epoch: epoch[str(size)])
        report(
            f"spectral/time to the peer's best R@1 at {size}",
            ours=ours,
            peer=best["seconds"],
            unit="s",
            peer_is="sentence-transformers' MatryoshkaLoss, its best of twelve epochs; 0 where ours has a lower R@1",
            ratio=best["seconds"] / ours,
            bound=">= 1",
            bounded=best["seconds"] / ours if found >= best[str(size)] else 0.0,
            r1_in_percent=round(found, 1),
            r1_of_peer=round(best[str(size)], 1),
            threads=THREADS,
        )


if __name__ == "__main__":
    main()
