"""Having the pictures of a set described, and scoring what is said."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig as Generation

from modeling_edgeglass import EdgeGlassDecodingProcessor, EdgeGlassForConditionalGeneration, EdgeGlassModel
from modeling_edgeglass.matryoshka import truncate_embeds
from training.decoding.config import GenerationConfig
from training.decoding.data import AnswersDataset, embed
from training.decoding.scores import exchange, score_self_retrieval, score_texts
from training.errors import DataError
from training.recovery import RecoverableTrainer


@dataclass(frozen=True)
class Embedded:
    """N pictures of a set, embedded, with what is asked of them.

    Args:
        rows: Their numbers in the set.
        questions: What is asked.
        answers: What should be said.
        image_ids: Equal for equal pictures (N,).
        embeds: Unit vectors (N, D), on the CPU.
    """

    rows: Sequence[int]
    questions: Sequence[str]
    answers: Sequence[str]
    image_ids: Tensor
    embeds: Tensor


@dataclass(frozen=True)
class Descriptions:
    """What was said of N pictures.

    Args:
        texts: In words.
        text_embeds: The words embedded again by the alignment's text tower (N, D), on the CPU.
    """

    texts: Sequence[str]
    text_embeds: Tensor


class Describer:
    """Has pictures of a set described by the model of a trainer, each rank its share; the result is on all.

    Args:
        trainer: Its model, its processor, its batches and its signals.
        dataset: Whose pictures they are.
        num_pictures: How many, evenly spread over the set; bad rows are left out.
        generation: How.
    """

    def __init__(
        self, trainer: RecoverableTrainer, dataset: AnswersDataset, num_pictures: int, generation: GenerationConfig
    ) -> None:
        self._trainer, self._dataset, self._generation = trainer, dataset, generation
        num_pictures = min(num_pictures, len(dataset))
        self._rows = [i * len(dataset) // num_pictures for i in range(num_pictures)]

    @property
    def _model(self) -> EdgeGlassForConditionalGeneration:
        return self._trainer.model  # type: ignore[return-value]

    @property
    def _processor(self) -> EdgeGlassDecodingProcessor:
        return self._trainer.processing_class  # type: ignore[return-value]

    def embed(self) -> Embedded:
        """The pictures; each passes the tower once, or not at all where its features are kept.

        Raises:
            DataError: All of them are bad.
            Interrupted: Some rank got a signal.
        """
        found: list[Any] = []
        for batch in self._trainer.agreed_batches(map(self._collate, self._batches(self._mine(self._rows)))):
            with self._trainer.accelerator.autocast():
                embeds = embed(self._model.alignment, self._trainer._prepare_inputs(batch)).float().cpu()
            columns = batch["rows"], batch["questions"], batch["answers"], batch["image_ids"].tolist(), embeds
            items = zip(*columns, strict=True)
            found += [item for item, is_valid in zip(items, batch["is_valid"], strict=True) if is_valid]
        if not (gathered := _in_order(found)):
            raise DataError(f"all {len(self._rows)} rows to describe are bad")
        rows, questions, answers, image_ids, vectors = zip(*gathered, strict=True)
        return Embedded(rows, questions, answers, torch.tensor(image_ids), torch.stack(vectors))

    def describe(self, pictures: Embedded, size: int | None = None, title: str | None = None) -> Descriptions:
        """What the model says of pictures, the likeliest word each time or by beams.

        Args:
            pictures: As `embed` gives them.
            size: Numbers of each embedding that are read; None takes all.
            title: Of the progress bar; None shows none.

        Raises:
            Interrupted: Some rank got a signal.
        """
        places = self._mine(range(len(pictures.rows)))
        batches = ({"places": part, "bad_samples": []} for part in self._batches(places))
        is_hidden = title is None or self._trainer.args.disable_tqdm or not self._trainer.is_world_process_zero()
        found: list[Any] = []
        with tqdm(total=len(places), desc=title, unit="picture", leave=False, disable=is_hidden) as bar:
            for batch in self._trainer.agreed_batches(batches):
                part = batch["places"]
                texts = self._say([pictures.questions[i] for i in part], pictures.embeds[part], size)
                with self._trainer.accelerator.autocast():
                    embeds = embed_texts(self._model.alignment, self._processor, texts).float().cpu()
                found += zip(part, texts, embeds, strict=True)
                bar.update(len(part))
        _, said, text_embeds = zip(*_in_order(found), strict=True)
        return Descriptions(said, torch.stack(text_embeds))

    def score(
        self, pictures: Embedded, size: int | None = None, *, exchanged: bool = False, title: str | None = None
    ) -> dict[str, float]:
        """Scores of what the model says of pictures: those of `score_texts` and of `score_self_retrieval`.

        Args:
            pictures: As `embed` gives them.
            size: Numbers of each embedding that are read; None takes all.
            exchanged: Have the model read another picture's embedding: what it gets right without looking.
            title: Of the progress bar; None shows none.

        Raises:
            Interrupted: Some rank got a signal.
        """
        seed, read = self._trainer.args.seed, pictures
        if exchanged:
            read = replace(pictures, embeds=pictures.embeds[exchange(len(pictures.rows), seed)])
        said = self.describe(read, size, title)
        retrieval = score_self_retrieval(said.text_embeds, pictures.embeds, pictures.image_ids)
        return score_texts(said.texts, pictures.answers, seed) | retrieval

    @torch.no_grad()
    def _say(self, questions: Sequence[str], embeds: Tensor, size: int | None) -> list[str]:
        model, processor = self._model, self._processor
        prompts = processor(text=list(questions)).to(model.device)
        longest, limit = processor.max_text_length, model.config.max_text_tokens
        if limit is not None:
            longest = max(1, min(longest, limit - prompts["input_ids"].shape[1]))
        generation = Generation(
            max_new_tokens=longest,
            num_beams=self._generation.num_beams,
            do_sample=False,
            eos_token_id=model.generation_config.eos_token_id or processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        )
        with self._trainer.accelerator.autocast():
            token_ids = model.generate(
                image_embeds=embeds.to(model.device), truncate_dim=size, generation_config=generation, **prompts
            )
        return processor.decode_answers(token_ids)

    def _collate(self, rows: Sequence[int]) -> dict[str, Any]:
        return self._trainer.data_collator([self._dataset[0, row] for row in rows]) | {"rows": rows}

    def _mine(self, numbers: Sequence[int]) -> Sequence[int]:
        args = self._trainer.args
        return numbers[args.process_index :: args.world_size]

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        step = self._trainer.args.per_device_eval_batch_size
        return (list(numbers[start : start + step]) for start in range(0, len(numbers), step))


def _in_order(found: list[Any]) -> list[Any]:
    """What all ranks found, by the number that each item begins with."""
    return sorted(gather_object(found), key=lambda item: item[0])


@torch.no_grad()
def embed_texts(alignment: EdgeGlassModel, processor: EdgeGlassDecodingProcessor, texts: Sequence[str]) -> Tensor:
    """Embeddings (N, D) of texts by an alignment."""
    inputs = processor.alignment_processor(text=list(texts)).to(alignment.device)
    return alignment.get_text_features(**inputs)


def nearest_text(
    alignment: EdgeGlassModel,
    processor: EdgeGlassDecodingProcessor,
    image_embeds: Tensor,
    texts: Sequence[str],
    size: int | None = None,
) -> str:
    """The text that is nearest to a picture's embedding (1, D), by the first `size` numbers; None takes all."""
    text_embeds = truncate_embeds(embed_texts(alignment, processor, texts), size)
    return texts[int((truncate_embeds(image_embeds, size) @ text_embeds.T).argmax())]
