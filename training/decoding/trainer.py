"""DecodingTrainer: trains the bridge from embeddings to a language model, and its adapters."""

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from modeling_edgeglass import EdgeGlassDecodingProcessor, EdgeGlassForConditionalGeneration, EdgeGlassModel
from modeling_edgeglass.language_models import IGNORED_LABEL
from training.decoding.data import AnswersCollator
from training.errors import DataError
from training.pairs_trainer import PairsTrainer
from training.tracking import name_as_we_do


class DecodingTrainer(PairsTrainer):
    """Trains an `EdgeGlassForConditionalGeneration` to say the answers of a data set.

    The loss of a step is the mean over all answer tokens of all its batches and ranks. Evaluation is the mean over the
    tokens of the whole set, at every size that is trained.

    Args:
        model: The model.
        args: As `build_decoding_arguments` makes them.
        processing_class: It makes the batches; it is saved with the model.
        max_text_length: Longest answer in tokens.
        text_noise: Length of the noise on embeddings of captions that stand for pictures, by their own (CapDec,
            arXiv:2211.00575): captions are not where pictures are, only near by.
        **options: As for `PairsTrainer`: the data sets, early stopping, callbacks, what a run goes on from.
    """

    def __init__(
        self,
        model: EdgeGlassForConditionalGeneration,
        args: TrainingArguments,
        *,
        processing_class: EdgeGlassDecodingProcessor,
        max_text_length: int = 128,
        text_noise: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=AnswersCollator(processing_class, max_text_length, model.config.max_text_tokens),
            **options,
        )
        name_as_we_do(self)
        self.text_noise = text_noise
        self._loss_shifts_labels = False  # the prefix stands before the first label, which is predicted too

    @property
    def _model(self) -> EdgeGlassForConditionalGeneration:
        return cast(EdgeGlassForConditionalGeneration, self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch's answers, by the number of answer tokens in all batches of the step."""
        self._bad_samples.record(inputs["bad_samples"])
        embeds = embed(self._model.alignment, inputs)
        if "caption_inputs" in inputs:
            embeds = with_noise(embeds, self.text_noise)
        taken = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
        taken |= {"image_embeds": embeds, "step": self.state.global_step}
        return super().compute_loss(model, taken, return_outputs, num_items_in_batch)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and perplexity of the answers, equal on every rank, for any number of ranks."""
        self._model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sizes = self._model.config.sizes
        columns = [self._measure(batch, sizes) for batch in self.agreed_batches(dataloader)]
        losses, counts, is_valid = map(torch.cat, zip(*columns, strict=True))
        num_bad = int((~is_valid).sum())
        if num_bad == len(is_valid):
            raise DataError(f"all {num_bad} rows to evaluate are bad")
        means = losses[is_valid].double().sum(dim=0) / counts[is_valid].sum()
        metrics = {"loss": means.mean().item(), "bad_rows": float(num_bad)}
        for size, mean in zip(sizes, means.tolist(), strict=True):
            metrics["perplexity" if size == sizes[0] else f"perplexity@{size}"] = math.exp(min(mean, 700.0))
        return EvalLoopOutput(
            predictions=numpy.empty(0),
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=int(is_valid.sum()),
        )

    def _measure(self, batch: dict[str, Any], sizes: list[int]) -> tuple[Tensor, ...]:
        """Of every row from every rank: -log of the probability of its answer (B, sizes), its tokens, is it good."""
        batch = self._prepare_inputs(batch)
        with self.accelerator.autocast():
            embeds = embed(self._model.alignment, batch)
            losses = [self._answer_losses(embeds, batch, size) for size in sizes]
        columns = torch.stack(losses, dim=1), (batch["labels"] != IGNORED_LABEL).sum(dim=1), batch["is_valid"]
        gathered = self.accelerator.gather_for_metrics(columns)
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return tuple(gathered)

    def _answer_losses(self, embeds: Tensor, batch: Mapping[str, Tensor], size: int) -> Tensor:
        """-log of the probability of each answer (B,), in nats."""
        model, labels = self._model, batch["labels"]
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(image_embeds=embeds, truncate_dim=size, **inputs).logits
        # Collated batches are padded on the right: what predicts token i stands one before it, behind the prefix.
        predicting = logits[:, model.config.num_prefix_tokens - 1 : -1]
        rows = zip(predicting, labels, strict=True)  # one by one: their softmax would be the vocabulary many times
        return torch.stack([F.cross_entropy(row.float(), said, reduction="sum") for row, said in rows])


@torch.no_grad()
def embed(alignment: EdgeGlassModel, batch: Mapping[str, Any]) -> Tensor:
    """Embeddings (B, D) of a batch's pictures, or of the captions in their place, or of what is kept."""
    if (captions := batch.get("caption_inputs")) is not None:
        return alignment.text_encoder(
            captions.get("input_ids"), captions.get("attention_mask"), captions.get("text_features")
        )
    return alignment.vision_encoder(batch.get("pixel_values"), batch.get("image_features"))


def with_noise(embeds: Tensor, length: float) -> Tensor:
    """Unit vectors (B, D) with Gaussian noise of an expected squared length of `length` squared; units again."""
    return F.normalize(embeds + torch.randn_like(embeds) * (length / embeds.shape[1] ** 0.5), dim=1)
