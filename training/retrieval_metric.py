"""Retrieval as a metric of the `evaluate` library, loaded by its path.

metric = evaluate.load("training/retrieval_metric.py")
metric.add_batch(image_embeds=..., text_embeds=...)
metric.compute(dimensions=[512, 128])
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch

from training.retrieval import retrieval_metrics

_INPUTS = """
Args:
    image_embeds: unit vectors, one per picture.
    text_embeds: unit vectors; text i is the caption of picture i.
    dimensions: Matryoshka sizes besides the full one; for `compute` alone.
    match_ids: lists of integers, one per pair: pairs with an equal one match each other; for `compute` alone.
Returns:
    i2t_r1, i2t_r5, i2t_r10, i2t_medr, i2t_map, i2t_ndcg, the same for t2i, and all at every size: i2t_r1@128.
"""


class RetrievalMetric(evaluate.Metric):
    """Recall, median rank, mAP and NDCG both ways at every Matryoshka size: `training.retrieval` as a metric."""

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Image-to-text and text-to-image retrieval at every Matryoshka size; ties count as misses.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"image_embeds": vector, "text_embeds": vector}),
        )

    def _compute(
        self,
        image_embeds: Any,
        text_embeds: Any,
        dimensions: Sequence[int] = (),
        match_ids: Sequence[Sequence[int]] = (),
    ) -> dict[str, float]:
        return retrieval_metrics(
            torch.tensor(image_embeds, dtype=torch.float32),
            torch.tensor(text_embeds, dtype=torch.float32),
            dimensions,
            [torch.tensor(ids) for ids in match_ids],
        )
