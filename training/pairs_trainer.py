"""PairsTrainer: what the trainers of an alignment and of its decoding share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments

from training.bad_samples import BadSampleLog
from training.callbacks import AlignmentProgressCallback, HistoryCallback, LogLineCallback
from training.data import PixmoParquetImageTextDataset
from training.history import Row, history_rows
from training.recovery import RecoverableTrainer
from training.signals import SignalListener

BAD_SAMPLES = "bad_samples.csv"


class PairsTrainer(RecoverableTrainer):
    """A recoverable trainer on pairs of parquet files: logs in our names, bad rows written down.

    Args:
        model: Has `trained_state_dict` and `load_trained_state_dict`.
        args: As `build_arguments` makes them.
        processing_class: It is saved with the model.
        data_collator: Makes batches of items.
        train_dataset: Items asked for as (epoch, index); None only evaluates.
        eval_dataset: The same for evaluation.
        early_stopping_patience: Evaluations without a better val loss before stopping; None never stops early.
        callbacks: Further callbacks.
        identity: As in `RecoverableTrainer`; so are `on_nan` and `signals`.
        max_bad_fraction: 0..1, share of a file's rows; more bad ones stop the run.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        processing_class: Any,
        data_collator: Any,
        train_dataset: Dataset[Any] | None = None,
        eval_dataset: Dataset[Any] | None = None,
        early_stopping_patience: int | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        identity: Mapping[str, Any] | None = None,
        on_nan: str = "stop",
        max_bad_fraction: float = 0.05,
        signals: SignalListener | None = None,
    ) -> None:
        if early_stopping_patience is not None:
            callbacks = [*callbacks, EarlyStoppingCallback(early_stopping_patience)]
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=list(callbacks),
            identity=identity,
            on_nan=on_nan,
            signals=signals,
        )
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(AlignmentProgressCallback)
        if self.pop_callback(PrinterCallback) is not None:
            self.add_callback(LogLineCallback)
        if train_dataset is not None:
            self.add_callback(HistoryCallback)
        rows_per_file: dict[str, int] = {}
        for dataset in (train_dataset, eval_dataset):
            if isinstance(dataset, PixmoParquetImageTextDataset):
                rows_per_file |= dataset.pairs.rows_per_file
        self._bad_samples = BadSampleLog(Path(str(args.output_dir)) / BAD_SAMPLES, rows_per_file, max_bad_fraction)

    @property
    def history(self) -> list[Row]:
        """What was logged: a row per step, under the logged names."""
        return history_rows(self.state.log_history)

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The model's weights but for frozen parts, which the run's identity names instead."""
        model: Any = self.model
        return model.trained_state_dict()

    def load_trained_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take them up."""
        model: Any = self.model
        model.load_trained_state_dict(state)

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Write its bad rows down."""
        self._bad_samples.record(batch["bad_samples"])

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Weight matrices decay; norms, biases and scalars, which have less than two axes, do not."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; an evaluation outside of training, as of the best model, is no point of the history."""
        if self.is_in_train:
            super().log(logs, start_time)
