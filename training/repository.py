"""What of a run goes to the Hub: the model, its card, and how it came about."""

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassDecodingConfig
from modeling_edgeglass.decoding_edgeglass import BRIDGE_FILE
from training.environment import ENVIRONMENT
from training.errors import ConfigError
from training.model_card import is_of_model, is_on_hub, model_card, read_json, read_settings
from training.privacy import check_private, public_settings
from training.results import CONFIG, FINAL_METRICS, MODEL_FOLDER
from training.visualization.report import FIGURES

logger = logging.getLogger(__name__)

ONNX_FOLDER, REPORT = "onnx", "export.json"  # of training.export

Files = dict[str, Path | bytes]  # contents, or files of them, by their paths in the repository


def repository_files(
    output_dir: Path,
    repo_id: str,
    *,
    licence: str | None = None,
    alignment: str | None = None,
    language_model: str | None = None,
    ask_hub: bool = True,
) -> Files:
    """All files of the repository of a finished run.

    Args:
        output_dir: The run's.
        repo_id: Of the repository; the examples in its card name it.
        licence: Of the model, as the Hub names it, such as `"apache-2.0"`.
        alignment: Of a bridge: id on the Hub of the alignment that it reads.
        language_model: Of a bridge: id on the Hub of the language model that it was trained for.
        ask_hub: Look up there under which licence the towers are.

    Raises:
        ConfigError: The run is not finished, a file of it cannot be read, a bridge's ends are on this machine alone,
            or a file holds what is nobody's business.
    """
    model = output_dir / MODEL_FOLDER
    needed = (f"{MODEL_FOLDER}/config.json", FINAL_METRICS, CONFIG, ENVIRONMENT)
    if missing := [name for name in needed if not (output_dir / name).is_file()]:
        raise ConfigError(f"{output_dir} holds no finished run: there is no {missing[0]}")
    config = read_json(model / "config.json")
    if config.get("model_type") not in (EdgeGlassConfig.model_type, EdgeGlassDecodingConfig.model_type):
        raise ConfigError(f"{model} holds a model of type {config.get('model_type')!r}, which is none of ours")
    if "auto_map" not in config:
        raise ConfigError(f"{model} was saved without its code: load it with from_pretrained and save it again")
    if (model / BRIDGE_FILE).exists():
        config = _with_public_ends(config, model, alignment, language_model)
    elif alignment or language_model:
        raise ConfigError(f"{model} is whole: it names no alignment and no language model that could be exchanged")
    files: Files = dict(_visible_files(model))
    files["config.json"] = _as_json(public_settings(config))
    files["metrics.json"] = (output_dir / FINAL_METRICS).read_bytes()
    settings = read_settings(output_dir / CONFIG)
    files["training_config.yaml"] = OmegaConf.to_yaml(OmegaConf.create(public_settings(settings))).encode()
    for name in FIGURES:
        if (path := output_dir / f"{name}.png").is_file():
            files[f"plots/{name}.png"] = path
    if is_of_model(output_dir / ONNX_FOLDER / REPORT, model):
        files |= {f"{ONNX_FOLDER}/{name}": path for name, path in _visible_files(output_dir / ONNX_FOLDER).items()}
    elif (output_dir / ONNX_FOLDER).exists():
        logger.warning("%s is no export of these weights and is left out; export again", output_dir / ONNX_FOLDER)
    card = model_card(output_dir, repo_id, config, settings, set(files), licence=licence, ask_hub=ask_hub)
    files["README.md"] = card.encode()
    check_private(files, [output_dir])
    return files


def _visible_files(folder: Path) -> dict[str, Path]:
    """The files below a folder, by their paths in it; but those that are hidden, or in a hidden folder."""
    paths = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in paths.items() if not any(part[0] == "." for part in name.parts)}


def _with_public_ends(
    config: dict[str, Any], model: Path, alignment: str | None, language_model: str | None
) -> dict[str, Any]:
    """The config of a bridge, with ends that others can load."""
    config = dict(config)
    for key, given in (("alignment", alignment), ("language", language_model)):
        if given:
            config |= {f"{key}_name_or_path": given, f"{key}_revision": "main"}
        name = str(config[f"{key}_name_or_path"])
        if not is_on_hub(name, config[f"{key}_revision"]):
            option = "--alignment" if key == "alignment" else "--language_model"
            raise ConfigError(
                f"{model} holds a bridge to {name}, which lies on this machine alone: push that first and give its id "
                f"with {option} user/name"
            )
    return config


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
