"""What leaves this machine: names without the places where files lie here, and no secret."""

import json
import mmap
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from training.errors import ConfigError

# As their makers print them: Hugging Face, W&B, GitHub, OpenAI.
_TOKENS = re.compile(
    rb"hf_(?:oauth_)?[A-Za-z0-9]{30,}|wandb_v1_\w{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|sk-[\w-]{40,}"
    rb"|(?i:api_key|(?:access|auth|hub)_?token)[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}\b"
)
# Settings that name files and directories.
_PLACES = re.compile(
    r"(_parquet|_dir|model_name|name_or_path|alignment|language_model|deepspeed|_config|config_file)$"
)

_SMALL = 1 << 24  # bytes; what is larger are weights, where a pattern takes its time


def public_name(name: str) -> str:
    """The name of a file or directory without its place on this machine: the last part of a path.

    Ids on the Hub, which have two parts, and addresses stay, the latter without who logs in there.
    """
    if "://" in name and not name.startswith("file:"):
        return re.sub(r"://[^/@]*@", "://", name)
    is_path = _begins_as_path(name) or name.count("/") > 1 or os.path.exists(name)
    is_file = re.search(r"\.(parquet|csv|json|ya?ml|safetensors)$|[*?]", name) and "/" in name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] if is_path or is_file else name


def public_settings(settings: Any, key: str = "") -> Any:
    """Settings as they may be shown: what names files and directories, and absolute paths anywhere, as `public_name`s.

    Args:
        settings: What JSON or YAML holds.
        key: What it is the value of.
    """
    if isinstance(settings, Mapping):
        return {name: public_settings(value, str(name)) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [public_settings(value, key) for value in settings]
    if not isinstance(settings, str):
        return settings
    is_place = _PLACES.search(key) or (_begins_as_path(settings) and settings.count("/") > 1)
    return public_name(settings) if is_place else settings


def public_command(command: str) -> str:
    """A command line whose paths are `public_name`s, also behind `key=` and in lists."""
    words = []
    for word in shlex.split(command):
        key, equals, value = word.rpartition("=")
        listed = re.fullmatch(r"\[(.*)\]", value)
        names = ",".join(public_name(part.strip()) for part in (listed[1] if listed else value).split(","))
        words.append(f"{key}{equals}" + (f"[{names}]" if listed else names))
    return shlex.join(words)


def check_private(files: Mapping[str, Path | bytes], places: Iterable[Path] = ()) -> None:
    """Look through what is to be sent: for what looks like a token in files below 16 MB, for the rest in all.

    Args:
        files: Contents, or files of them, by their names.
        places: Directories that are not to be told, besides home and the working directory.

    Raises:
        ConfigError: One holds a token, or a path of this machine.
    """
    secrets = _forms(value for value in (get_token(), os.environ.get("WANDB_API_KEY")) if value)
    all_places = {str(path) for place in (Path.home(), Path.cwd(), *places) for path in (place, place.resolve())}
    forms = _forms(all_places - {"/", "."})
    for name, content in files.items():
        with _opened(content) as data:
            found = {
                "a token": any(data.find(secret) >= 0 for secret in secrets),
                "a path of this machine": any(_names_place(data, place) for place in forms),
                "what looks like a token": len(data) < _SMALL and _TOKENS.search(data) is not None,
            }
        for what, is_there in found.items():
            if is_there:
                raise ConfigError(f"{name} holds {what} and is not sent: remove it there, and push again")


def _begins_as_path(name: str) -> bool:
    return name.startswith(("/", "~/", "./", "../", "file:")) or bool(re.match(r"[A-Za-z]:[/\\]", name))


def _forms(texts: Iterable[str]) -> set[bytes]:
    """Texts as they are, and as JSON writes them."""
    return {form.encode() for text in texts for form in (text, json.dumps(text)[1:-1])}


def _names_place(data: bytes | mmap.mmap, place: bytes) -> bool:
    """Whether a path stands there by itself, and not as a part of another."""
    start = data.find(place)
    while start >= 0:
        around = data[max(0, start - 1) : start], data[start + len(place) : start + len(place) + 1]
        if not any(re.match(rb"[\w./-]" if side == 0 else rb"[\w.-]", byte) for side, byte in enumerate(around)):
            return True
        start = data.find(place, start + 1)
    return False


@contextmanager
def _opened(content: Path | bytes) -> Iterator[bytes | mmap.mmap]:
    if isinstance(content, bytes) or content.stat().st_size == 0:  # which cannot be mapped
        yield content if isinstance(content, bytes) else b""
        return
    with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        yield mapped
