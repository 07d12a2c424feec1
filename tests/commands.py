"""Commands in processes of their own, as a user starts them."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

BIN = Path(sys.executable).parent

METRICS = {f"val/{way}_r{k}{size}" for way in ("i2t", "t2i") for k in (1, 5, 10) for size in ("", "@32", "@16")}


def start(*command: object, expect_success: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode == 0) == expect_success, done.stdout + done.stderr
    return done


def run_alignment(config: Path, *overrides: str, **options) -> subprocess.CompletedProcess[str]:
    return start(sys.executable, "run_alignment.py", "--config", config, *overrides, **options)


def final_metrics(output_dir: Path) -> dict[str, float]:
    """All but times."""
    metrics = json.loads((output_dir / "final_metrics.json").read_text())
    return {name: value for name, value in metrics.items() if not name.endswith(("runtime", "per_second"))}


def evaluated_again(output_dir: Path) -> dict[str, float]:
    val = output_dir.parent / "val.parquet"
    command = ("-m", "training.evaluate", output_dir / "model", val, "--batch-size", 4, "--split", "val")
    assert "dimension | i2t R@1" in start(sys.executable, *command).stdout
    metrics = json.loads((output_dir / "val_metrics.json").read_text())
    assert metrics.pop("weights")
    return metrics


def in_background(*command: object) -> subprocess.Popen[str]:
    """In a group of its own, as launchers start it."""
    environment = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK")}
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(condition, seconds: float = 100) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
