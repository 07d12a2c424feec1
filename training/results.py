"""What a run leaves in its output directory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from training.errors import ConfigError

FINAL_METRICS = "final_metrics.json"
MODEL_FOLDER = "model"


def refuse_finished_run(output_dir: str | os.PathLike[str]) -> None:
    """Stop before a finished run would be written over.

    Raises:
        ConfigError: `output_dir` holds one.
    """
    if (Path(output_dir) / FINAL_METRICS).exists():
        raise ConfigError(
            f"{output_dir} holds a finished run; set trainer.output_dir to another directory, or remove this one"
        )


def save_model(model: EdgeGlassModel, processor: EdgeGlassProcessor, output_dir: str | os.PathLike[str]) -> None:
    """Write the model, its config and its processor to `output_dir`/model, for `from_pretrained`."""
    model.save_pretrained(Path(output_dir) / MODEL_FOLDER)
    processor.save_pretrained(Path(output_dir) / MODEL_FOLDER)


def save_metrics(metrics: Mapping[str, float], path: str | os.PathLike[str]) -> None:
    """Write metrics as JSON, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(dict(metrics), indent=2) + "\n")
    aside.replace(path)
