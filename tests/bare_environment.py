"""A virtual environment without this project: what a stranger has who loads one of our repositories."""

import importlib.metadata
import subprocess
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def make_bare_environment(folder: Path, *packages: str) -> Path:
    """An environment that holds some packages of this one and what they require; returns its interpreter.

    Packages are linked, not copied: torch alone has hundreds of megabytes.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    interpreter = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = Path(subprocess.check_output([interpreter, "-c", code], text=True).strip())
    for name in _with_requirements(packages):
        distribution = importlib.metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site_packages / entry).exists():
                (site_packages / entry).symlink_to(Path(str(distribution.locate_file(entry))).resolve())
    return interpreter


def _with_requirements(packages: tuple[str, ...]) -> set[str]:
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in packages]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found.add(name)
        requirements = map(Requirement, lines)
        waiting += [
            canonicalize_name(requirement.name)
            for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ]
    return found
