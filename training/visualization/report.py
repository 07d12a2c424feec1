"""report.html: one file with everything that a run left, for people; it opens without a network."""

import base64
import json
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from training.environment import ENVIRONMENT
from training.history import EPOCH, STEP, read_history
from training.results import CONFIG, FINAL_METRICS, PREEMPTED
from training.retrieval import RECALL_KS
from training.tables import DESCRIPTION_COLUMNS, DESCRIPTION_UNITS, description_rows, recall_rows

REPORT = "report.html"

# In the order that they are read in; each with what it answers.
FIGURES = {
    "retrieval_gallery": "What does it find?",
    "training_curves": "Has it learnt, and does val still follow?",
    "mrl_performance": "How much do small embeddings keep?",
    "loss_components": "Which part of the loss moves?",
    "similarity_matrix": "Are pairs more alike than the rest?",
    "embedding_space": "Where do pictures and captions lie?",
    "attention_map": "Where does the pooling look?",
    "descriptions": "What does it say of pictures?",
    "lr_schedule": "What was the learning rate?",
}


def write_report(output_dir: str | os.PathLike[str], full_dimension: int | None) -> Path:
    """Write `report.html` from the files of a run: figures, tables, config, environment, command.

    Args:
        output_dir: The run's output directory.
        full_dimension: Numbers of the full embedding; None where it is not known.
    """
    folder = Path(output_dir)
    rows = read_history(folder)
    evaluations = [row for row in rows if "val/loss" in row]
    last = evaluations[-1] if evaluations else {}
    final = _read_json(folder / FINAL_METRICS)
    metrics = final or last
    config = folder / CONFIG
    template = resources.files("training.visualization").joinpath("report.html.jinja").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(template).render(
        name=folder.resolve().name,
        state=_state(folder, bool(final), rows[-1] if rows else {}),
        origin="the model that was saved" if final else f"step {last.get(STEP, 0)}",
        recall=recall_rows(metrics, full_dimension),
        recall_ks=RECALL_KS,
        description_columns=DESCRIPTION_COLUMNS,
        description_units=DESCRIPTION_UNITS,
        descriptions=description_rows(metrics, full_dimension) if "val/perplexity" in metrics else [],
        metrics={name: value for name, value in sorted(metrics.items()) if "@" not in name},
        figures=[
            (name, question, base64.b64encode(path.read_bytes()).decode())
            for name, question in FIGURES.items()
            if (path := folder / f"{name}.png").exists()
        ],
        environment=_read_json(folder / ENVIRONMENT),
        config=config.read_text() if config.exists() else "",
    )
    aside = folder / f"{REPORT}.tmp"
    aside.write_text(html, encoding="utf-8")
    return aside.replace(folder / REPORT)


def _state(folder: Path, is_finished: bool, last: Mapping[str, Any]) -> str:
    reached = f"step {last.get(STEP, 0)}, epoch {last.get(EPOCH, 0):.4g}"
    if is_finished:
        return f"finished at {reached}"
    return f"stopped by a signal at {reached}" if (folder / PREEMPTED).exists() else f"at {reached}"


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
