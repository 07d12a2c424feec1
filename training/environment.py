"""Where and how a run was started, for its report."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from training.errors import clear_write_errors

ENVIRONMENT = "environment.json"
_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "huggingface_hub", "pillow", "numpy")


def describe_environment(started: datetime, num_processes: int) -> dict[str, Any]:
    """Command, hardware and versions of this session.

    Args:
        started: When, with a time zone.
        num_processes: Ranks that train together.
    """
    accelerators = [torch.accelerator.current_accelerator()] if torch.accelerator.is_available() else []
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or list(map(str, accelerators))
    return {
        "command": launch_command(),
        "started": started.isoformat(timespec="seconds"),
        "processes": num_processes,
        "accelerators": names or ["none"],
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def save_environment(environment: dict[str, Any], output_dir: str | os.PathLike[str]) -> None:
    """Write it to a run's output directory."""
    path = Path(output_dir) / ENVIRONMENT
    with clear_write_errors(path):
        path.write_text(json.dumps(environment, indent=2) + "\n")


def launch_command() -> str:
    """The command that started this process: the launcher's, where one did."""
    command = sys.orig_argv
    try:
        launcher = (psutil.Process().parent() or psutil.Process()).cmdline()
    except psutil.Error:
        launcher = []
    return readable_command(launcher if sys.argv[0] in launcher else command)


def readable_command(command: Sequence[str]) -> str:
    """A command as one would type it: programs by their names instead of the places where they are installed."""
    words = list(command)
    if len(words) > 1 and os.path.basename(words[1]) in ("accelerate", "torchrun"):
        words = words[1:]  # a script of an environment runs as `python /.../bin/accelerate`
    return shlex.join([os.path.basename(words[0]), *words[1:]])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
