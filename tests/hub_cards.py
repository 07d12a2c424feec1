"""Model cards as the Hub reads them: metadata, and what is wrong with it."""

import re
from typing import Any

import yaml

LICENSES = ("apache-2.0", "mit", "gemma", "other")  # some that the Hub knows
# The block of YAML that opens a card, as huggingface_hub.repocard finds it.
METADATA = re.compile(r"^(?:\s*---[\r\n]+)([\S\s]*?)(?:[\r\n]+---(?:\r\n|\n|$))")
_RESULT = {"task": {"type": None}, "dataset": {"name": None, "type": None}, "metrics": [{"type": None, "value": None}]}
MODEL_INDEX = [{"name": None, "results": [_RESULT]}]  # the fields that each entry must have


def read_metadata(readme: str) -> Any:
    """The YAML at the top of a model card; None if there is none."""
    block = METADATA.match(readme)
    return yaml.safe_load(block[1]) if block else None


def check_card(readme: str) -> tuple[list[str], list[str]]:
    """Errors and warnings, in the Hub's words."""
    try:
        metadata = read_metadata(readme)
    except yaml.YAMLError as error:
        return [f"bad YAML: {error}"], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(metadata, dict):
        return ['"value" must be of type object'], []
    errors = what_is_missing(metadata.get("model-index", []), MODEL_INDEX, "model-index")
    if metadata.get("license", LICENSES[0]) not in LICENSES:
        errors.append(f'"license" must be one of {", ".join(LICENSES)}')
    return errors, []


def what_is_missing(value: Any, required: Any, name: str) -> list[str]:
    if isinstance(required, list):
        if not isinstance(value, list):
            return [f'"{name}" must be an array']
        return [text for i, item in enumerate(value) for text in what_is_missing(item, required[0], f"{name}[{i}]")]
    if required is None:
        return []
    if not isinstance(value, dict):
        return [f'"{name}" must be of type object']
    missing = [f'"{name}.{key}" is required' for key in required if key not in value]
    there = {key: inner for key, inner in required.items() if key in value}
    return missing + [text for key in there for text in what_is_missing(value[key], there[key], f"{name}.{key}")]
