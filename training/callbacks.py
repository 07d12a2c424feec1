"""What a run says while it goes on: names of metrics, and progress."""

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

_TRAIN_NAMES = {"learning_rate": "lr"}
_SPLITS = {"eval_": "val/", "test_": "test/", "train_": "train/"}


def logged_names(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer's names as ours: `loss` becomes `train/loss`, `learning_rate` `train/lr`, `eval_i2t_r1` `val/i2t_r1`."""
    renamed = {}
    for name, value in logs.items():
        if name == "train_loss":  # of the whole session; `loss` is the mean since the last log
            renamed["train/mean_loss"] = value
            continue
        for prefix, split in _SPLITS.items():
            if name.startswith(prefix):
                renamed[split + name.removeprefix(prefix)] = value
                break
        else:
            renamed["train/" + _TRAIN_NAMES.get(name, name)] = value
    return renamed


class AlignmentProgressCallback(ProgressCallback):
    """Trainer's progress bars, with one short line per log: losses, or R@1 both ways."""

    _SHOWN = (
        "train/epoch",
        "train/loss",
        "train/loss_clip",
        "train/loss_mrl",
        "train/lr",
        "val/loss",
        "val/i2t_r1",
        "val/t2i_r1",
    )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            named = logged_names(logs)
            shown = [f"{name} {named[name]:.4g}" for name in self._SHOWN if name in named]
            if len(shown) > 1:  # more than the epoch
                self.training_bar.write(f"step {state.global_step}  " + "  ".join(shown))
