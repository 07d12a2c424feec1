"""How long a command takes to say something that needs no model.

    python benchmarks/startup.py

`run_alignment.py --help` and a run with a wrong value in its config, beside a process that only imports torch and
transformers. Prints one JSON line each.
"""

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import alternate, report  # noqa: E402

LIMIT = 0.5  # seconds


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    mistake = ("run_alignment.py", "--config", "configs/pixmo_alignment.yaml", "optimization.lr=-1")
    seconds = alternate(
        {
            "--help": partial(start, "run_alignment.py", "--help"),
            "error in the config": partial(start, *mistake, status=1),
            "imports": partial(start, "-c", "import torch, transformers"),
        }
    )
    for name in ("--help", "error in the config"):
        report(
            f"start-up/{name}",
            ours=seconds[name],
            peer=seconds["imports"],
            unit="s",
            peer_is="python -c 'import torch, transformers'",
            ratio=seconds[name] / seconds["imports"],
            bound=f"<= {LIMIT} s",
            bounded=seconds[name],
        )


def start(*arguments: str, status: int = 0) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {done.returncode}: {done.stderr}")


if __name__ == "__main__":
    main()
