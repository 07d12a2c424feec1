"""Pictures of a run: `TrainingVisualizer`, and `python -m training.visualization OUTPUT_DIR`."""

from training.visualization.descriptions import Described, load_descriptions, remove_descriptions, save_descriptions
from training.visualization.draw import draw_run
from training.visualization.gallery import Gallery, find_nearest
from training.visualization.overview import caption_lengths, model_parts, pairs_grid
from training.visualization.sample import EvaluationSample, load_sample, remove_sample, sample_evaluation, save_sample
from training.visualization.visualizer import TrainingVisualizer

__all__ = [
    "Described",
    "EvaluationSample",
    "Gallery",
    "TrainingVisualizer",
    "caption_lengths",
    "draw_run",
    "find_nearest",
    "load_descriptions",
    "load_sample",
    "model_parts",
    "pairs_grid",
    "remove_descriptions",
    "remove_sample",
    "sample_evaluation",
    "save_descriptions",
    "save_sample",
]
