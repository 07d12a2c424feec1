"""Every figure of a run and its report, from the files in its output directory alone."""

import os
from collections.abc import Callable

from training.history import read_history
from training.visualization.curves import NothingToDrawError
from training.visualization.descriptions import load_descriptions
from training.visualization.report import write_report
from training.visualization.sample import load_sample
from training.visualization.visualizer import TrainingVisualizer


def draw_run(output_dir: str | os.PathLike[str], method: str = "pca") -> dict[str, Exception]:
    """Draw what there is to draw, and write `report.html`; one figure that fails does not keep the others back.

    Args:
        output_dir: A run's output directory, with `training_history.json` and, after the first evaluation,
            `evaluation_sample.safetensors`.
        method: Of the embedding space, `"pca"` or `"tsne"`.

    Returns:
        What failed, by the names of the figures.

    Raises:
        DataError: The directory has no history, or a file is damaged.
    """
    rows = read_history(output_dir)
    sample = load_sample(output_dir)
    full_dimension = None if sample is None else sample.image_embeds.shape[1]
    draw = TrainingVisualizer(output_dir)
    figures: dict[str, Callable[[], object]] = {
        "training_curves": lambda: draw.plot_training_curves(rows),
        "loss_components": lambda: draw.plot_loss_components(rows),
        "lr_schedule": lambda: draw.plot_lr_schedule(rows),
    }
    if sample is not None:
        embeds = sample.image_embeds.float(), sample.text_embeds.float()
        figures |= {
            "mrl_performance": lambda: draw.plot_mrl_performance(sample.metrics, sample.image_embeds.shape[1]),
            "embedding_space": lambda: draw.plot_embedding_space(*embeds, method=method),
            "similarity_matrix": lambda: draw.plot_similarity_matrix(*embeds, sample.captions),
            "retrieval_gallery": lambda: draw.plot_retrieval_gallery(
                sample.pictures.numpy(), sample.picture_captions, sample.text_to_image, sample.image_to_text
            ),
        }
        if len(sample.attention):
            figures["attention_map"] = lambda: draw.plot_attention_map(sample.attended.numpy(), sample.attention)
    if described := load_descriptions(output_dir):
        figures["descriptions"] = lambda: draw.plot_descriptions(described)
    figures["report"] = lambda: write_report(output_dir, full_dimension)
    failed: dict[str, Exception] = {}
    for name, make in figures.items():
        try:
            make()
        except NothingToDrawError:  # before the first log, or the first evaluation
            continue
        except Exception as error:  # whatever matplotlib makes of odd captions and numbers; the caller says so
            failed[name] = error
    return failed
