"""What retrieval of 10,000 pictures and 10,000 captions costs at six sizes, both ways.

    python benchmarks/evaluation.py

Unit vectors of 4096 numbers whose pairs share a signal, so that about 0.3 of the queries find their match first. Ours
gives recall, median rank, mAP and NDCG at 4096, 2048, 1024, 512, 256 and 128. The textbook multiplies queries and
gallery in chunks and counts who is ahead of the match, once per direction and size. Prints one JSON line per peer, and
one of the memory beyond the embeddings.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measure import alternate, in_fresh_process, peak_memory, report
from training.retrieval import RECALL_KS, retrieval_metrics

PAIRS, D, SMALLER = 10_000, 4096, (2048, 1024, 512, 256, 128)
NOISE = 19.0  # length of the noise beside a signal of length 1
CHUNK = 1024  # queries, as large as ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args()
    images, texts = make_pairs()
    runs = {
        "six sizes": partial(retrieval_metrics, images, texts, SMALLER),
        "one size": partial(retrieval_metrics, images, texts, ()),
        "textbook": partial(textbook, images, texts, (D,)),
    }
    if options.memory:
        retrieval_metrics(images[:64], texts[:64], SMALLER)  # what is loaded and set up once
        print(peak_memory(runs[options.memory]) / 1e6)
        return
    memory, peer_memory = (in_fresh_process(__file__, "--memory", name) for name in ("six sizes", "textbook"))
    seconds = alternate(runs)
    metrics = retrieval_metrics(images, texts, SMALLER)
    check_same_work(metrics, textbook(images, texts, (D, *SMALLER)))
    ours = seconds["six sizes"]
    for peer, peer_is in (("textbook", "textbook, full size alone"), ("one size", "ours, full size alone")):
        report(
            f"evaluation/six sizes by {peer}, N={PAIRS}",
            ours=ours,
            peer=seconds[peer],
            unit="s",
            peer_is=peer_is,
            ratio=ours / seconds[peer],
            bound="<= 1.3",
            i2t_r1=round(metrics["i2t_r1"], 3),
            threads=torch.get_num_threads(),
        )
    report(
        f"evaluation/memory beyond the embeddings, N={PAIRS}",
        ours=memory,
        peer=peer_memory,
        unit="MB",
        peer_is=f"textbook, full size alone, {CHUNK} queries at a time",
        ratio=memory / peer_memory,
        bound="<= 1",
        repeats=1,
    )


def check_same_work(metrics: dict[str, float], expected: dict[str, float]) -> None:
    """The same recalls, but for a few queries: what float32 cannot tell apart counts against the model in ours."""
    for name, value in expected.items():
        if abs(metrics[name] - value) > 5 / PAIRS:
            raise SystemExit(f"not the same work: {name} is {metrics[name]}, and {value} by the textbook")


def make_pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    signal, noise = (F.normalize(torch.randn(PAIRS, D, generator=generator), dim=-1) for _ in range(2))
    return signal, F.normalize(signal + NOISE * noise, dim=-1)


def textbook(images: Tensor, texts: Tensor, sizes: Sequence[int]) -> dict[str, float]:
    """Recall of each size on its own, both ways."""
    metrics = {}
    for size in sizes:
        prefixes = images, texts
        if size < D:
            prefixes = F.normalize(images[:, :size], dim=-1), F.normalize(texts[:, :size], dim=-1)
        for way, (queries, gallery) in (("i2t", prefixes), ("t2i", prefixes[::-1])):
            ranks = []
            for rows in torch.arange(len(queries)).split(CHUNK):
                similarities = queries[rows] @ gallery.T
                match = similarities[torch.arange(len(rows)), rows]
                ranks.append((similarities >= match.unsqueeze(1)).sum(dim=1))
            rank = torch.cat(ranks)
            suffix = "" if size == D else f"@{size}"
            metrics |= {f"{way}_r{k}{suffix}": (rank <= k).double().mean().item() for k in RECALL_KS}
    return metrics


if __name__ == "__main__":
    main()
