"""AlignmentTrainer: transformers' Trainer for pairs, evaluated by retrieval."""

import logging
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from training.batches import ImageTextCollator
from training.callbacks import VisualizationCallback
from training.errors import DataError, SickTrainingError
from training.pairs_trainer import PairsTrainer
from training.retrieval import EncodedPairs, retrieval_metrics
from training.tracking import name_as_we_do

logger = logging.getLogger(__name__)

COLLAPSED_COSINE = 0.999
MODEL_INPUTS = ("pixel_values", "image_features", "input_ids", "text_features", "attention_mask")


class AlignmentTrainer(PairsTrainer):
    """Trains an `EdgeGlassModel` on pairs and evaluates it by retrieval.

    Batches, logs, checkpoints and devices are Trainer's. Ours are the order of the samples, the draw of the
    Matryoshka size from the step, the parts of the loss in the log, and evaluation: one encode of the whole
    set, then the loss over all sizes and R@K both ways at every size.

    Args:
        model: The model.
        args: As `build_training_arguments` makes them.
        processing_class: Its tokenizer makes the batches; it is saved with every checkpoint.
        tower_chunk_size: Pairs that pass the towers at once; None takes the whole batch.
        visualize: Draw figures and the report into the output directory after every evaluation.
        **options: As for `PairsTrainer`: the data sets, early stopping, callbacks, what a run goes on from.

    Attributes:
        encoded: The pairs of the last evaluation, on the CPU of rank 0; None before, and on other ranks.
    """

    def __init__(
        self,
        model: EdgeGlassModel,
        args: TrainingArguments,
        *,
        processing_class: EdgeGlassProcessor,
        tower_chunk_size: int | None = None,
        visualize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=ImageTextCollator(processing_class.tokenizer),
            **options,
        )
        if visualize:
            self.add_callback(VisualizationCallback(self))
        name_as_we_do(self)  # behind the figures, which they send
        self.tower_chunk_size = tower_chunk_size
        self.encoded: EncodedPairs | None = None
        self._loss_parts = torch.zeros(3, dtype=torch.float64)  # sums of loss_clip and loss_mrl, number of batches

    @property
    def _model(self) -> EdgeGlassModel:
        return cast(EdgeGlassModel, self.model)

    def progress(self) -> dict[str, Any]:
        """As in `PairsTrainer`, with the sums of the parts of the loss."""
        return super().progress() | {"loss_parts": self._loss_parts.tolist()}

    def load_progress(self, progress: Mapping[str, Any]) -> None:
        """Take it up."""
        super().load_progress(progress)
        self._loss_parts = torch.tensor(progress["loss_parts"], dtype=torch.float64)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The alignment loss of a batch; its parts are kept for the log."""
        self._bad_samples.record(inputs["bad_samples"])
        outputs = model(
            **self._model_inputs(inputs),
            return_loss=True,
            step=self.state.global_step,
            caption_ids=inputs["token_hashes"],
        )
        parts = torch.stack([outputs.loss_clip, outputs.loss_mrl, torch.ones_like(outputs.loss)]).detach().double()
        if self.on_nan == "stop" or parts.isfinite().all():
            self._loss_parts = self._loss_parts.to(parts.device) + parts
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `PairsTrainer`, with `loss_clip` and `loss_mrl` beside `loss`: means since the last log."""
        if "loss" in logs:
            clip, mrl, count = self.accelerator.reduce(self._loss_parts, reduction="sum").tolist()
            if count:
                logs |= {"loss_clip": clip / count, "loss_mrl": mrl / count}
            else:  # every step since the last log was dropped, and Trainer says 0
                del logs["loss"]
            self._loss_parts = torch.zeros_like(self._loss_parts)
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Encode the set once, then measure loss and retrieval; equal on every rank, for any number of ranks."""
        self._model.eval()
        self.callback_handler.eval_dataloader = dataloader
        columns = [self._encode(batch) for batch in self.agreed_batches(dataloader)]
        *whole, is_valid = map(torch.cat, zip(*columns, strict=True))
        image_embeds, text_embeds, token_hashes, *match_ids = [column[is_valid] for column in whole]
        num_bad = int((~is_valid).sum())
        if len(image_embeds) < 2:
            raise DataError(
                f"of the {len(is_valid)} pairs to evaluate {num_bad} are bad: retrieval needs two good ones"
            )
        if not (image_embeds.isfinite().all() and text_embeds.isfinite().all()):
            raise SickTrainingError(
                "embeddings are NaN or infinite, so that nothing can be ranked: training has diverged "
                f"(step {self.state.global_step})"
            )
        warn_if_collapsed(image_embeds, text_embeds)
        metrics = self._mean_loss(image_embeds, text_embeds, token_hashes) | {"bad_rows": float(num_bad)}
        metrics |= retrieval_metrics(image_embeds, text_embeds, self._model.config.mrl_dimensions, match_ids)
        on_cpu = image_embeds.cpu(), text_embeds.cpu()
        if self.is_world_process_zero():
            rows, ids = is_valid.nonzero().flatten().cpu(), [column.cpu() for column in match_ids]
            self.encoded = EncodedPairs(*on_cpu, rows, ids, dataloader.dataset)
        return EvalLoopOutput(
            predictions=cast(Any, tuple(embeds.numpy() for embeds in on_cpu)),
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(image_embeds),
        )

    def _model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Pictures and captions of a batch, or what is kept of them."""
        inputs = {key: batch[key] for key in MODEL_INPUTS if key in batch}
        return inputs | {"tower_chunk_size": self.tower_chunk_size}

    @torch.no_grad()
    def _encode(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Embeddings and ids of a batch from every rank, without the samples that only fill the last one up."""
        batch = self._prepare_inputs(batch)
        with self.accelerator.autocast():
            outputs = self._model(**self._model_inputs(batch))
        columns = (
            outputs.image_embeds,
            outputs.text_embeds,
            batch["token_hashes"],
            batch["image_ids"],
            batch["caption_ids"],
            batch["is_valid"],
        )
        gathered = self.accelerator.gather_for_metrics(columns)
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return tuple(gathered)

    @torch.no_grad()
    def _mean_loss(self, image_embeds: Tensor, text_embeds: Tensor, token_hashes: Tensor) -> dict[str, float]:
        """Loss over all sizes in fixed batches: it depends neither on the size last drawn nor on the ranks."""
        num_batches = max(1, len(image_embeds) // self.args.per_device_eval_batch_size)
        batches = zip(
            *(column.tensor_split(num_batches) for column in (image_embeds, text_embeds, token_hashes)), strict=True
        )
        sums = torch.zeros(3, dtype=torch.float64)
        for images, texts, hashes in batches:
            losses = self._model.alignment_loss(
                images,
                texts,
                logit_scale=self._model.capped_logit_scale(),
                caption_ids=hashes,
                gather_negatives=False,
            )
            sums += torch.stack([losses.loss, losses.loss_clip, losses.loss_mrl]).cpu() * len(images)
        loss, loss_clip, loss_mrl = (sums / len(image_embeds)).tolist()
        return {"loss": loss, "loss_clip": loss_clip, "loss_mrl": loss_mrl}


def warn_if_collapsed(image_embeds: Tensor, text_embeds: Tensor) -> None:
    """Warn where all unit vectors (N, D) of one side are alike; the mean cosine is their mean's squared length."""
    for side, embeds in (("image", image_embeds), ("text", text_embeds)):
        mean_cosine = float(embeds.mean(dim=0).square().sum())
        if mean_cosine > COLLAPSED_COSINE:
            logger.warning(
                "collapsed: all %s embeddings are alike (mean cosine %.5f); a lower rate or a larger batch may help",
                side,
                mean_cosine,
            )
