"""What leaves this machine: names without the places where files lie here, and no secret."""

import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from training.errors import ConfigError

# Tokens of the Hub and of W&B, as they are printed by their makers.
_TOKENS = re.compile(rb"hf_[A-Za-z0-9]{30,}|(?i:api_key|token)[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}\b")

_DATA_FILE = re.compile(r"\.(parquet|csv|json|ya?ml|safetensors)$|^\S*[*?]\S*$")


def public_name(name: str) -> str:
    """A name without its place on this machine: the last part of a path; ids on the Hub and addresses as they are."""
    if "://" in name or "/" not in name.replace("\\", "/"):
        return name
    begins_as_path = name.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:[/\\]", name)
    has_parts = name.count("/") > 1 and " " not in name  # an id has two
    if begins_as_path or has_parts or _DATA_FILE.search(name) or os.path.exists(name):
        return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    return name


def public_settings(settings: Any) -> Any:
    """What JSON or YAML holds, as it may be shown: names of files and directories are `public_name`s."""
    if isinstance(settings, Mapping):
        return {name: public_settings(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [public_settings(value) for value in settings]
    return public_name(settings) if isinstance(settings, str) else settings


def public_command(command: str) -> str:
    """A command line whose paths are `public_name`s, also behind `key=`."""
    words = []
    for word in command.split(" "):
        key, equals, value = word.rpartition("=")
        words.append(f"{key}{equals}{public_name(value)}")
    return " ".join(words)


def check_private(files: Mapping[str, Path | bytes]) -> None:
    """Look through every byte of what is to be sent.

    Args:
        files: Contents, or files of them, by their names.

    Raises:
        ConfigError: One holds a token, or a path of this machine.
    """
    secrets = [value.encode() for value in (get_token(), os.environ.get("WANDB_API_KEY")) if value]
    places = {str(place) for place in (Path.home(), Path.cwd(), *map(Path.resolve, (Path.home(), Path.cwd())))}
    paths = [f"{place}/".encode() for place in places if place.count("/") > 1 or place == "/root"]
    for name, content in files.items():
        for what, needles in (("a token", secrets), ("a path of this machine", paths)):
            if any(_holds(content, needle) for needle in needles):
                raise ConfigError(f"{name} holds {what} and is not sent: remove it there, and push again")
        if _holds(content, _TOKENS):
            raise ConfigError(f"{name} holds what looks like a token and is not sent: remove it there, and push again")


def _holds(content: Path | bytes, needle: bytes | re.Pattern[bytes]) -> bool:
    if isinstance(content, Path):
        if content.stat().st_size == 0:
            return False
        with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _found(mapped, needle)
    return _found(content, needle)


def _found(content: bytes | mmap.mmap, needle: bytes | re.Pattern[bytes]) -> bool:
    return needle.search(content) is not None if isinstance(needle, re.Pattern) else content.find(needle) >= 0
