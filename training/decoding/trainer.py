"""DecodingTrainer: trains the bridge from embeddings to a language model, and its adapters."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from modeling_edgeglass import EdgeGlassDecodingProcessor, EdgeGlassForConditionalGeneration
from modeling_edgeglass.language_models import IGNORED_LABEL, num_predicting
from training.callbacks import DescriptionsCallback
from training.decoding.config import GenerationConfig
from training.decoding.data import AnswersCollator, AnswersDataset, embed
from training.decoding.describing import Describer
from training.errors import DataError, told_by_each_rank
from training.pairs_trainer import PairsTrainer
from training.results import save_metrics
from training.tracking import name_as_we_do

UNTRAINED_METRICS = "untrained_metrics.json"


class DecodingTrainer(PairsTrainer):
    """Trains an `EdgeGlassForConditionalGeneration` to say the answers of a data set.

    The loss of a step is the mean over all answer tokens of all its batches and ranks. Evaluation is the mean over the
    tokens of the whole set, at every size that is trained.

    Args:
        model: The model.
        args: As `build_decoding_arguments` makes them.
        processing_class: It makes the batches; it is saved with the model.
        text_noise: Length of the noise on embeddings of captions that stand for pictures, by their own (CapDec,
            arXiv:2211.00575): captions are not where pictures are, only near by.
        generation: How val pictures are described: a few after every evaluation, and more, which are scored, in one
            that is no part of training; None describes nothing.
        visualize: Draw figures and the report into the output directory after every evaluation.
        **options: As for `PairsTrainer`: the data sets, early stopping, callbacks, what a run goes on from.

    Attributes:
        evaluated: The set of the last evaluation.
        described: Of a few of its pictures row, question, right answer, and what was said.
    """

    def __init__(
        self,
        model: EdgeGlassForConditionalGeneration,
        args: TrainingArguments,
        *,
        processing_class: EdgeGlassDecodingProcessor,
        text_noise: float = 1.0,
        generation: GenerationConfig | None = None,
        visualize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            args,
            processing_class=processing_class,
            data_collator=AnswersCollator(processing_class, model.config.max_text_tokens),
            **options,
        )
        if visualize:
            self.add_callback(DescriptionsCallback(self))
        name_as_we_do(self)  # behind the figures, which they send
        self.text_noise, self.generation = text_noise, generation or GenerationConfig(num_samples=0, num_scored=0)
        self.evaluated: Any = None
        self.described: list[tuple[int, str, str, str]] = []
        self._untrained: dict[str, float] = {}
        self._loss_shifts_labels = False  # the prefix stands before the first label, which is predicted too

    @property
    def _model(self) -> EdgeGlassForConditionalGeneration:
        return cast(EdgeGlassForConditionalGeneration, self.model)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch's answers, by the number of answer tokens in all batches of the step."""
        self._bad_samples.record(inputs["bad_samples"])
        with self.accelerator.autocast():
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
        dataset: Any = dataloader.dataset
        self.evaluated = dataset
        self.described = self._describe_samples(dataset) if self.generation.num_samples else []
        if self.generation.num_scored and not self.is_in_train:
            metrics |= self.score_descriptions(dataset)
        return EvalLoopOutput(
            predictions=numpy.empty(0),
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=int(is_valid.sum()),
        )

    @torch.no_grad()
    def score_descriptions(self, dataset: AnswersDataset, *, full_size_alone: bool = False) -> dict[str, float]:
        """Have pictures described and score what is said; see `Describer.score`.

        Args:
            dataset: Whose pictures they are, evenly spread, `generation.num_scored` at most.
            full_size_alone: Leave out the smaller sizes, and what is said of another picture's embedding.

        Returns:
            `cider` and the other scores, `cider@d` of embeddings of d numbers, and `other_cider` of the model that
            reads the embedding of another picture, where there is one; nothing where all pictures are bad.
        """
        self._model.eval()
        describer = Describer(self, dataset, self.generation.num_scored, self.generation)
        if (pictures := describer.embed()) is None:
            return {}
        full, *sizes = self._model.config.sizes
        scores = describer.score(pictures, title=f"describe {full}")
        if full_size_alone:
            return scores
        for size in sizes:
            found = describer.score(pictures, size, title=f"describe {size}")
            scores |= {f"{name}@{size}": value for name, value in found.items()}
        if len(pictures.image_ids.unique()) > 1:
            found = describer.score(pictures, exchanged=True, title="describe another picture")
            scores |= {f"other_{name}": value for name, value in found.items()}
        return scores | (self._untrained if dataset is self.eval_dataset else {})

    def score_untrained(self, *, is_resumed: bool) -> None:
        """Score the model before its first step; a run that goes on has this from its first session.

        Raises:
            Interrupted: Some rank got a signal.
        """
        path = Path(str(self.args.output_dir)) / UNTRAINED_METRICS
        if not self.generation.num_scored or not isinstance(self.eval_dataset, AnswersDataset):
            return
        how = {"num_scored": self.generation.num_scored, "num_beams": self.generation.num_beams}
        if not is_resumed:
            with told_by_each_rank():
                scores = self.score_descriptions(self.eval_dataset, full_size_alone=True)
            self._untrained = {f"untrained_{name}": value for name, value in scores.items()}
            if self.args.should_save:
                save_metrics(how | self._untrained, path)
        elif path.exists():
            kept = json.loads(path.read_text())
            if {name: kept.pop(name, None) for name in how} == how:  # or they are of other pictures
                self._untrained = kept

    def _describe_samples(self, dataset: AnswersDataset) -> list[tuple[int, str, str, str]]:
        describer = Describer(self, dataset, self.generation.num_samples, self.generation)
        if (pictures := describer.embed()) is None:
            return []
        texts = describer.describe(pictures).texts
        return list(zip(pictures.rows, pictures.questions, pictures.answers, texts, strict=True))

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
        model = self._model
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        # Collated batches are padded on the right: no token changes its place behind the prefix.
        labels = F.pad(batch["labels"], (model.config.num_prefix_tokens, 0), value=IGNORED_LABEL)
        kept = num_predicting(labels)
        logits = model(image_embeds=embeds, truncate_dim=size, logits_to_keep=kept, **inputs).logits
        # One by one: their softmax would be the vocabulary many times.
        rows = zip(logits[:, -kept:-1], labels[:, labels.shape[1] - kept + 1 :], strict=True)
        return torch.stack([F.cross_entropy(row.float(), said, reduction="sum") for row, said in rows])


def with_noise(embeds: Tensor, length: float) -> Tensor:
    """Unit vectors (B, D) with Gaussian noise of an expected squared length of `length` squared; units again."""
    return F.normalize(embeds + torch.randn_like(embeds) * (length / embeds.shape[1] ** 0.5), dim=1)
