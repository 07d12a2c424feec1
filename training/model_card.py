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
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from modeling_edgeglass import EdgeGlassConfig
from training.environment import ENVIRONMENT
from training.errors import ConfigError, DataError, printable
from training.files import weights_fingerprint
from training.parquet import find_parquet_files
from training.privacy import public_command, public_name
from training.results import FINAL_METRICS, MODEL_FOLDER
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


def model_card(
    output_dir: Path,
    repo_id: str,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    files: Set[str],
    *,
    licence: str | None,
    ask_hub: bool,
) -> str:
    """README.md of a repository: metadata for the Hub, then text for people.

    Args:
        output_dir: The run's output directory.
        repo_id: Of the repository; the examples name it.
        config: The model's.
        settings: The run's.
        files: Paths in the repository besides the card.
        licence: Of the model, as the Hub names it; None where nobody said.
        ask_hub: Look up there under which licence the towers are.

    Raises:
        ConfigError: A file of the run cannot be read.
    """
    is_alignment = config["model_type"] == EdgeGlassConfig.model_type
    metrics = read_metrics(output_dir)
    parts = alignment_parts(config, ask_hub) if is_alignment else decoder_parts(config, ask_hub)
    alignment = config if is_alignment else config["alignment_config"]
    emissions = read_emissions(output_dir / CARBON)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training", "model_cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    run = read_json(output_dir / ENVIRONMENT)
    text = environment.get_template("alignment.md.jinja" if is_alignment else "decoder.md.jinja").render(
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        config=config,
        dimension=alignment["projection_dim"],
        smallest=min([*alignment["mrl_dimensions"], alignment["projection_dim"]]),
        parts=parts,
        settings=settings,
        data={split: describe_data(settings["dataset"][f"{split}_parquet"]) for split in ("train", "val")},
        val_has_chosen=settings["trainer"].get("eval_strategy", "epoch") not in ("no", False),
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


def read_json(path: Path) -> dict[str, Any]:
    """What a file of a run holds.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged: {printable(str(error), 200)}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: is damaged: it holds no names and values")
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """The resolved config of a run.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not {"dataset", "optimization", "trainer"} <= set(settings):
            raise ValueError("a section is missing")
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: is damaged: {printable(str(error), 200)}") from error
    return settings


def read_metrics(output_dir: Path) -> dict[str, dict[str, float]]:
    """The metrics of each set that the model was measured on, val first, under the logged names.

    What `training.evaluate` measured of a model that was there before is passed over.
    """
    found = {"val": read_json(output_dir / FINAL_METRICS)}
    for path in sorted(output_dir.glob("*_metrics.json")):
        split = path.name.removesuffix("_metrics.json")
        if split not in ("final", "val", "untrained") and is_of_model(path, output_dir / MODEL_FOLDER):
            found[split] = {name: value for name, value in read_json(path).items() if name.startswith(f"{split}/")}
    return found


def is_of_model(path: Path, model: Path) -> bool:
    """Whether what a JSON file tells was measured with the weights of a saved model, or made of them."""
    return path.is_file() and read_json(path).get("weights") == weights_fingerprint(model)


def alignment_parts(config: Mapping[str, Any], ask_hub: bool) -> list[Part]:
    """The two backbones of an alignment's config."""
    return [
        _part(
            f"{side} tower",
            config[f"{side}_name_or_path"],
            config[f"{side}_revision"],
            config[f"{side}_config"]["model_type"],
            "frozen" if config[f"{side}_freeze"] else "trained",
            ask_hub,
        )
        for side in ("vision", "text")
    ]


def decoder_parts(config: Mapping[str, Any], ask_hub: bool) -> list[Part]:
    """The alignment and the language model of a decoder's config."""
    kinds = {
        "alignment": (EdgeGlassConfig.model_type, "frozen"),
        "language": (config["text_config"]["model_type"], config["language_training"]),
    }
    roles = {"alignment": "alignment", "language": "language model"}
    return [
        _part(roles[end], config[f"{end}_name_or_path"], config[f"{end}_revision"], *kinds[end], ask_hub)
        for end in roles
    ]


def is_on_hub(name_or_path: str, revision: str | None) -> bool:
    """Whether a part came from the Hub, of which its commit is kept; a directory may have a name like an id."""
    return revision is not None and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path))


def _part(
    role: str, name_or_path: str | None, revision: str | None, model_type: str, training: str, ask_hub: bool
) -> Part:
    place = name_or_path or "unknown"
    on_hub = is_on_hub(place, revision)
    licence = _licence_there(place) if on_hub and ask_hub else _licence_here(Path(place))
    return Part(role, place if on_hub else public_name(place), model_type, training, licence, on_hub)


def _licence_here(folder: Path) -> str:
    """What the card in a directory says."""
    try:
        return _stated(ModelCard.load(folder / "README.md").data)
    except (OSError, ValueError, YAMLError):  # there is none, or none that can be read
        return _LICENCE_UNKNOWN


def _licence_there(repo_id: str) -> str:
    """What the card of a repository says."""
    try:
        return _stated(model_info(repo_id).card_data)
    except (HTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return _LICENCE_UNKNOWN  # the Hub cannot be asked, or knows no such model any more


def _stated(card: Any) -> str:
    stated = (card and card.get("license")) or _LICENCE_UNKNOWN
    if stated == "other":
        stated = card.get("license_name") or stated
    return ", ".join(stated) if isinstance(stated, list) else str(stated)


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
    try:
        with path.open(newline="") as file:
            by_session = {row["run_id"]: float(row["emissions"]) for row in csv.DictReader(file)}  # kilograms so far
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is no file of CodeCarbon's: {printable(str(error))}; remove it") from error
    return float(f"{1000 * sum(by_session.values()):.3g}")


def evaluation_results(
    metrics: Mapping[str, Mapping[str, float]], settings: Mapping[str, Any], is_alignment: bool
) -> list[EvalResult]:
    """What the Hub shows beside the card: R@1 of every size, or the scores of descriptions."""
    results = []
    for split, values in metrics.items():
        name = _first_name(settings["dataset"]["val_parquet"]) if split == "val" else split
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


def _first_name(parquet: Any) -> str:
    return public_name(str(parquet if isinstance(parquet, str) else parquet[0]))


_RECALLS = {"i2t_r1": "image to text R@1", "t2i_r1": "text to image R@1"}
_SCORES = {"cider": "CIDEr", "bleu4": "BLEU-4", "rouge_l": "ROUGE-L", "self_r1": "self-retrieval R@1"}
