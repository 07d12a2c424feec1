"""Kill a real run with SIGKILL again and again, and compare what it leaves with a run that nobody disturbed.

    python benchmarks/crash.py --kills 20

Both runs are `run_alignment.py` on the emoji of the demo with small random towers that train, dropout and all.
Every other kill strikes while a checkpoint is being written, the others at random moments of training. Prints one
JSON line: kills survived, and how many weights, optimizer moments, logged values and metrics differ. The status is 1
where anything differs, or where the run ended before all the kills.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.towers import save_tiny_text_tower, save_tiny_vision_tower  # noqa: E402
from training.checkpoints import newest_checkpoint  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = write_config(Path(folder), epochs=max(1, options.kills // 4))
        undisturbed, disturbed = Path(folder) / "undisturbed", Path(folder) / "disturbed"
        finish(config, undisturbed)
        kills = {"in training": 0, "in saves": 0}
        while sum(kills.values()) < options.kills:
            moment = "in saves" if sum(kills.values()) % 2 else "in training"
            if kill_one_session(config, disturbed, moment, rng):
                kills[moment] += 1
            else:
                break  # the run came to its end first
            print(f"kill {sum(kills.values())} {moment}: {newest_checkpoint(disturbed)}", file=sys.stderr, flush=True)
        finish(config, disturbed)
        result = {"kills survived": sum(kills.values()), **kills}
        differences = count_differences(undisturbed, disturbed)
        print(json.dumps(result | {"differences": differences}))
        if any(differences.values()) or sum(kills.values()) < options.kills:
            sys.exit(1)


def write_config(folder: Path, epochs: int) -> Path:
    """A run of 43 steps an epoch, saved every fourth step."""
    encoder = {"projection_dim": 128, "mrl_dimensions": [64, 32], "freeze": False}
    config = {
        "dataset": {
            "train_parquet": str(ROOT / "examples/data/emoji_train.parquet"),
            "val_parquet": str(ROOT / "examples/data/emoji_val.parquet"),
            "max_text_length": 32,
        },
        "vision_encoder": {"model_name": save_tiny_vision_tower(folder / "vision"), **encoder},
        "text_encoder": {"model_name": save_tiny_text_tower(folder / "text"), **encoder},
        "trainer": {
            "output_dir": "",
            "epochs": epochs,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_steps": 4,
            "disable_tqdm": True,
        },
    }
    path = folder / "crash.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(config: Path, output_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "run_alignment.py", "--config", str(config), f"trainer.output_dir={output_dir}"]
    with (config.parent / f"{output_dir.name}.log").open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def finish(config: Path, output_dir: Path) -> None:
    """Start a session and wait for the end of the run."""
    if start(config, output_dir).wait() != 0:
        sys.exit((config.parent / f"{output_dir.name}.log").read_text()[-2000:])


def kill_one_session(config: Path, output_dir: Path, moment: str, rng: random.Random) -> bool:
    """Start, wait for the moment, kill; false where the run ended before it came."""
    before = newest_checkpoint(output_dir)
    process = start(config, output_dir)
    while process.poll() is None and newest_step(output_dir) <= (int(before.name.split("-")[1]) if before else 0):
        time.sleep(0.01)  # until the session has saved something of its own: every kill costs some steps, none all
    if moment == "in training":
        time.sleep(rng.uniform(0, 1.5))
    else:
        saves_to_pass = rng.randrange(3)
        while process.poll() is None and saves_to_pass >= 0:
            if list(output_dir.glob("unfinished-*")):
                time.sleep(rng.uniform(0, 0.02))
                saves_to_pass -= 1
                if saves_to_pass < 0:
                    break
                while list(output_dir.glob("unfinished-*")) and process.poll() is None:
                    time.sleep(0.0005)
            time.sleep(0.0005)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def newest_step(output_dir: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")), default=0)


def count_differences(left: Path, right: Path) -> dict[str, int]:
    """How many tensors and numbers of two finished runs differ in any bit."""
    differences = {}
    weights = [load_file(path / "model" / "model.safetensors") for path in (left, right)]
    differences["weights"] = sum(not torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    checkpoints = [newest_checkpoint(path) for path in (left, right)]
    optimizers = [torch.load(path / "optimizer.pt", weights_only=True)["state"] for path in checkpoints if path]
    differences["optimizer"] = sum(
        not torch.equal(torch.as_tensor(value), torch.as_tensor(optimizers[1][index][key]))
        for index, state in optimizers[0].items()
        for key, value in state.items()
    )
    logs = [
        without_times(json.loads((path / "trainer_state.json").read_text())["log_history"])
        for path in checkpoints
        if path
    ]
    differences["log"] = abs(len(logs[0]) - len(logs[1])) + sum(a != b for a, b in zip(*logs, strict=False))
    metrics = [without_times([json.loads((path / "final_metrics.json").read_text())])[0] for path in (left, right)]
    differences["metrics"] = sum(metrics[0][key] != metrics[1].get(key) for key in metrics[0])
    return differences


def without_times(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logged values but for times, and for the summary that Trainer logs at the end of a session."""
    return [
        {key: value for key, value in entry.items() if not key.endswith(("runtime", "per_second"))}
        for entry in entries
        if "train_runtime" not in entry
    ]


if __name__ == "__main__":
    main()
