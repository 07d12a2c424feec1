"""What tests of pushing share: what arrived, and its examples run by others."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.commands import ROOT
from tests.hub_server import HubServer

REPO = "tester/colours"


def sent(hub: HubServer) -> dict[str, bytes]:
    """The files of the repository after its last commit."""
    return {name: file.content for name, file in hub.repositories[REPO].commits[-1].files.items()}


def snippets(files: Mapping[str, bytes]) -> list[str]:
    return re.findall(r"```python\n(.*?)```", files["README.md"].decode(), re.DOTALL)


def run_snippet(hub: HubServer, interpreter: Path, code: str, folder: Path) -> str:
    """What some lines of Python print, run with their packages and the Hub alone."""
    here = Path(sys.executable) == interpreter
    environment = hub.environment(folder / "home") | ({"PYTHONPATH": str(ROOT)} if here else {})
    code = f"import torch\ntorch.set_grad_enabled(False)\n{code}" if "onnxruntime" not in code else code
    done = subprocess.run([interpreter, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
