"""TrainingVisualizer: every figure of a run, returned and saved."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from training.history import History, history_rows, logged_names
from training.visualization import curves, embeddings
from training.visualization.descriptions import Described, descriptions_figure
from training.visualization.gallery import Gallery
from training.visualization.style import save_figure

Pictures = Sequence[np.ndarray] | np.ndarray  # RGB, each (S, S, 3)


class TrainingVisualizer:
    """Draws the figures of a run into a directory; each is returned too.

    Figures are matplotlib's own `Figure`, made without pyplot: nothing is shown, nothing stays in memory, no display
    is needed. A history is `trainer.history`, the `log_history` of a `trainer_state.json`, or plain dicts, as
    `training.history.history_rows` reads them. Where there is nothing to draw, every method raises a ValueError.

    Args:
        save_dir: Directory of the PNG files; made when the first is written.
    """

    def __init__(self, save_dir: str | os.PathLike[str]) -> None:
        self.save_dir = Path(save_dir)

    def plot_training_curves(self, history: History) -> Figure:
        """`training_curves.png`: loss of train and val, and R@1 both ways or perplexity, over steps."""
        return self._save("training_curves", curves.training_curves(history_rows(history)))

    def plot_loss_components(self, history: History) -> Figure:
        """`loss_components.png`: CLIP, Matryoshka and total loss over steps, of train and val."""
        return self._save("loss_components", curves.loss_components(history_rows(history)))

    def plot_lr_schedule(self, history: History) -> Figure:
        """`lr_schedule.png`: the learning rate over steps."""
        return self._save("lr_schedule", curves.lr_schedule(history_rows(history)))

    def plot_mrl_performance(self, metrics: History | Mapping[str, float], full_dimension: int = 4096) -> Figure:
        """`mrl_performance.png`: R@1 both ways over the size of the embedding.

        Args:
            metrics: A history, whose last evaluation is drawn, or the metrics of one evaluation.
            full_dimension: Numbers of the full embedding.
        """
        is_one_evaluation = isinstance(metrics, Mapping) and all(isinstance(v, int | float) for v in metrics.values())
        rows: Sequence[Mapping[str, Any]] = [logged_names(metrics)] if is_one_evaluation else history_rows(metrics)  # type: ignore[arg-type]
        curves.require(rows, "val/i2t_r1")
        last = next(row for row in reversed(rows) if "val/i2t_r1" in row)
        return self._save("mrl_performance", curves.mrl_performance(last, full_dimension))

    def plot_embedding_space(self, image_embeds: Tensor, text_embeds: Tensor, method: str = "pca") -> Figure:
        """`embedding_space.png`: pictures and captions (N, D) in one plane, by `"pca"` or `"tsne"`."""
        return self._save("embedding_space", embeddings.embedding_space(image_embeds, text_embeds, method))

    def plot_similarity_matrix(self, image_embeds: Tensor, text_embeds: Tensor, captions: Sequence[str]) -> Figure:
        """`similarity_matrix.png`: cosines of up to 64 pictures and captions, unit vectors (N, D)."""
        return self._save("similarity_matrix", embeddings.similarity_matrix(image_embeds, text_embeds, captions))

    def plot_retrieval_gallery(
        self, pictures: Pictures, captions: Sequence[str], text_to_image: Gallery, image_to_text: Gallery
    ) -> Figure:
        """`retrieval_gallery.png`: what some captions and some pictures find; see `embeddings.retrieval_gallery`."""
        return self._save(
            "retrieval_gallery", embeddings.retrieval_gallery(pictures, captions, text_to_image, image_to_text)
        )

    def plot_attention_map(self, pictures: Pictures, weights: Tensor) -> Figure:
        """`attention_map.png`: pictures (S, S, 3), and the pooling's weights (N, height, width) over each."""
        return self._save("attention_map", embeddings.attention_map(pictures, weights))

    def plot_descriptions(self, described: Sequence[Described]) -> Figure:
        """`descriptions.png`: pictures with what a language model said of their embeddings."""
        return self._save("descriptions", descriptions_figure(described))

    def _save(self, name: str, figure: Figure) -> Figure:
        self.save_dir.mkdir(parents=True, exist_ok=True)
        save_figure(figure, self.save_dir / f"{name}.png")
        return figure
