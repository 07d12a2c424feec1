"""The card of a pushed model, written from what its run left."""

import csv
import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pyarrow.parquet
from huggingface_hub import EvalResult, ModelCard, ModelCardData, model_info
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from omegaconf import OmegaConf

from modeling_edgeglass import EdgeGlassConfig
from training.environment import ENVIRONMENT
from training.errors import DataError
from training.parquet import find_parquet_files
from training.privacy import public_command, public_name
from training.results import CONFIG, FINAL_METRICS
from training.tables import DESCRIPTION_COLUMNS, DESCRIPTION_UNITS, description_rows, recall_rows

CARBON = "emissions.csv"  # CodeCarbon's, where trainer.report_to names it

_LICENCE_UNKNOWN = "not stated where it came from"


@dataclass(frozen=True)
class Part:
    """A pretrained model that went into a run.

    Args:
        role: What it is there for.
        name: Id on the Hub, or the last part of the directory that it came from.
        model_type: As its config says.
        training: Whether and how it was trained.
        licence: Its licence, as far as it is known.
        on_hub: The name is an id on the Hub.
    """

    role: str
    name: str
    model_type: str
    training: str
    licence: str
    on_hub: bool


def model_card(output_dir: Path, repo_id: str, config: Mapping[str, Any], files: Set[str], licence: str | None) -> str:
    """README.md of a repository: metadata for the Hub, then text for people.

    Args:
        output_dir: The run's output directory.
        repo_id: Of the repository; the examples name it.
        config: The model's.
        files: Paths in the repository besides the card.
        licence: Of the model, as the Hub names it; None where nobody said.
    """
    is_alignment = config["model_type"] == EdgeGlassConfig.model_type
    metrics = read_metrics(output_dir)
    parts = alignment_parts(config) if is_alignment else decoder_parts(config)
    settings: Any = OmegaConf.to_container(OmegaConf.load(output_dir / CONFIG))
    alignment = config if is_alignment else config["alignment_config"]
    emissions = read_emissions(output_dir / CARBON)
    loader = jinja2.PackageLoader("training", "model_cards")
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    run = json.loads((output_dir / ENVIRONMENT).read_text())
    text = environment.get_template("alignment.md.jinja" if is_alignment else "decoder.md.jinja").render(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        config=config,
        dimension=alignment["projection_dim"],
        smallest=min([*alignment["mrl_dimensions"], alignment["projection_dim"]]),
        parts=parts,
        settings=settings,
        data={split: describe_data(settings["dataset"][f"{split}_parquet"]) for split in ("train", "val")},
        metrics=metrics,
        recall_rows=recall_rows,
        description_columns=DESCRIPTION_COLUMNS,
        description_units=DESCRIPTION_UNITS,
        description_rows=description_rows,
        run=run | {"command": public_command(run["command"])},
        emissions=emissions,
        files=files,
    )
    extra: dict[str, Any] = {}  # what ModelCardData names nowhere, but the Hub does
    if emissions is not None:
        extra["co2_eq_emissions"] = {"emissions": emissions, "source": "CodeCarbon"}
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if is_alignment else "image-to-text",
        base_model=[part.name for part in parts if part.on_hub] or None,
        tags=["edgeglass", "matryoshka", *(["sentence-transformers", "image-text-retrieval"] if is_alignment else [])],
        model_name=repo_id.split("/")[-1],
        eval_results=evaluation_results(metrics, settings, is_alignment) or None,
        **extra,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def read_metrics(output_dir: Path) -> dict[str, dict[str, float]]:
    """The metrics of each set that the model was measured on, val first, under the logged names."""
    found = {"val": json.loads((output_dir / FINAL_METRICS).read_text())}
    for path in sorted(output_dir.glob("*_metrics.json")):
        metrics, split = json.loads(path.read_text()), path.name.removesuffix("_metrics.json")
        if all(name.startswith(f"{split}/") for name in metrics):  # what training.evaluate wrote
            found.setdefault(split, metrics)
    return found


def alignment_parts(config: Mapping[str, Any]) -> list[Part]:
    """The two backbones of an alignment's config."""
    return [
        _part(
            f"{side} tower",
            config[f"{side}_name_or_path"],
            config[f"{side}_config"]["model_type"],
            "frozen" if config[f"{side}_freeze"] else "trained",
        )
        for side in ("vision", "text")
    ]


def decoder_parts(config: Mapping[str, Any]) -> list[Part]:
    """The alignment and the language model of a decoder's config."""
    language = config["text_config"]["model_type"], config["language_training"]
    return [
        _part("alignment", config["alignment_name_or_path"], EdgeGlassConfig.model_type, "frozen"),
        _part("language model", config["language_name_or_path"], *language),
    ]


def _part(role: str, name_or_path: str | None, model_type: str, training: str) -> Part:
    name = public_name(name_or_path or "unknown")
    on_hub = name == name_or_path and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name))
    return Part(role, name, model_type, training, _licence(name_or_path), on_hub)


def _licence(name_or_path: str | None) -> str:
    """What the card of a model says; without a network, of one in a directory alone."""
    if name_or_path is None:
        return _LICENCE_UNKNOWN
    card = Path(name_or_path) / "README.md"
    if card.is_file():
        return ModelCard.load(card).data.get("license") or _LICENCE_UNKNOWN
    if Path(name_or_path).exists():
        return _LICENCE_UNKNOWN
    try:
        data = model_info(name_or_path).card_data
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return _LICENCE_UNKNOWN  # the Hub cannot be asked, or knows no such model
    return (data and data.get("license")) or _LICENCE_UNKNOWN


def describe_data(parquet: Any) -> str:
    """Names of parquet files, and how many rows they have where they still are in their place."""
    paths = [parquet] if isinstance(parquet, str) else list(parquet)
    names = ", ".join(f"`{public_name(str(path))}`" for path in paths)
    try:
        rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in find_parquet_files(paths))
    except (DataError, OSError, pyarrow.ArrowException):
        return names
    return f"{names}, {rows:,} pairs"


def read_emissions(path: Path) -> float | None:
    """Grams of CO2 equivalents in CodeCarbon's file, which has a line per session; None where there is none."""
    if not path.is_file():
        return None
    with path.open(newline="") as file:
        by_session = {row["run_id"]: float(row["emissions"]) for row in csv.DictReader(file)}  # kilograms so far
    return round(1000 * sum(by_session.values()), 3)


def evaluation_results(
    metrics: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any], is_alignment: bool
) -> list[EvalResult]:
    """What the Hub shows beside the card: R@1 of every size, or the scores of descriptions."""
    results = []
    for split, values in metrics.items():
        name = describe_data(settings["dataset"]["val_parquet"]).split("`")[1] if split == "val" else split
        for metric, value in values.items():
            base, _, size = metric.removeprefix(f"{split}/").partition("@")
            if base not in (_RECALLS if is_alignment else _SCORES):
                continue
            words = (_RECALLS if is_alignment else _SCORES)[base] + (f", {size} numbers" if size else "")
            results.append(
                EvalResult(
                    task_type="image-text-retrieval" if is_alignment else "image-to-text",
                    task_name="Image-text retrieval" if is_alignment else "Image description",
                    dataset_type=re.sub(r"[^\w.-]", "_", Path(name).stem) or split,
                    dataset_name=name,
                    dataset_split=split,
                    metric_type="recall" if is_alignment else base,
                    metric_name=words,
                    metric_value=round(value, 4),
                )
            )
    return results


_RECALLS = {"i2t_r1": "image to text R@1", "t2i_r1": "text to image R@1"}
_SCORES = {"cider": "CIDEr", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "self_r1": "self-retrieval R@1"}
