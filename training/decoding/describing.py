"""Having the pictures of a set described, and scoring what is said."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from modeling_edgeglass import EdgeGlassDecodingProcessor, EdgeGlassForConditionalGeneration, EdgeGlassModel
from modeling_edgeglass.matryoshka import truncate_embeds
from training.decoding.config import GenerationConfig
from training.decoding.data import AnswersDataset, embed
from training.decoding.scores import exchange, score_self_retrieval, score_texts
from training.recovery import RecoverableTrainer

# Settings of a language model that would have its say in the choice of a token.
_LIKELIEST: dict[str, Any] = {
    "do_sample": False,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
}


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

    def embed(self) -> Embedded | None:
        """The pictures; each passes the tower once, or not at all where its features are kept. None: all are bad.

        Raises:
            Interrupted: Some rank got a signal.
        """
        found: list[Any] = []
        for batch in self._trainer.agreed_batches(map(self._collate, self._batches(self._mine(self._rows)))):
            with self._trainer.accelerator.autocast():
                embeds = embed(self._model.alignment, self._trainer._prepare_inputs(batch))
            columns = batch["rows"], batch["questions"], batch["answers"], batch["image_ids"].tolist(), _rows(embeds)
            items = zip(*columns, strict=True)
            found += [item for item, is_valid in zip(items, batch["is_valid"], strict=True) if is_valid]
        if not (gathered := _in_order(found)):
            return None
        rows, questions, answers, image_ids, vectors = zip(*gathered, strict=True)
        return Embedded(rows, questions, answers, torch.tensor(image_ids), torch.from_numpy(numpy.stack(vectors)))

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
                with self._trainer.accelerator.autocast():
                    questions, embeds = [pictures.questions[i] for i in part], pictures.embeds[part]
                    num_beams = self._generation.num_beams
                    texts = say(self._model, self._processor, questions, embeds, size, num_beams=num_beams)
                    vectors = embed_texts(self._model.alignment, self._processor, texts)
                found += zip(part, texts, _rows(vectors), strict=True)
                bar.update(len(part))
        _, said, text_embeds = zip(*_in_order(found), strict=True)
        return Descriptions(said, torch.from_numpy(numpy.stack(text_embeds)))

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
            read = replace(pictures, embeds=pictures.embeds[exchange(pictures.image_ids, seed)])
        said = self.describe(read, size, title)
        retrieval = score_self_retrieval(said.text_embeds, pictures.embeds, pictures.image_ids)
        return score_texts(said.texts, pictures.answers, seed) | retrieval

    def _collate(self, rows: Sequence[int]) -> dict[str, Any]:
        return self._trainer.data_collator([self._dataset[0, row] for row in rows]) | {"rows": rows}

    def _mine(self, numbers: Sequence[int]) -> Sequence[int]:
        args = self._trainer.args
        return numbers[args.process_index :: args.world_size]

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        step = self._trainer.args.per_device_eval_batch_size
        return (list(numbers[start : start + step]) for start in range(0, len(numbers), step))


def _rows(embeds: Tensor) -> list[Any]:
    """Vectors of a batch, each of which is sent to other ranks alone: a row of a tensor would take all with it."""
    return list(embeds.float().cpu().numpy())


def _in_order(found: list[Any]) -> list[Any]:
    """What all ranks found, by the number that each item begins with."""
    return sorted(gather_object(found), key=lambda item: item[0])


@torch.no_grad()
def say(
    model: EdgeGlassForConditionalGeneration,
    processor: EdgeGlassDecodingProcessor,
    questions: Sequence[str],
    embeds: Tensor,
    size: int | None = None,
    *,
    num_beams: int = 1,
    num_candidates: int = 1,
) -> list[str]:
    """Answers of a model to questions about embeddings (B, D), `num_candidates` of each one behind the other.

    One is the likeliest token each time, or found by beams, whatever else the language model's own settings say; more
    are drawn as those settings say. An answer is as long as the processor allows at most, and as the language model
    has positions for.
    """
    prompts = processor(text=list(questions)).to(model.device)
    longest, limit = processor.max_text_length, model.config.max_text_tokens
    if limit is not None:
        longest = max(1, min(longest, limit - prompts["input_ids"].shape[1]))
    ends = model.generation_config.eos_token_id
    ends = {*([ends] if isinstance(ends, int) else ends or []), processor.tokenizer.eos_token_id} - {None}
    settings = {"do_sample": True, "num_return_sequences": num_candidates} if num_candidates > 1 else _LIKELIEST
    token_ids = model.generate(
        image_embeds=embeds.to(model.device),
        truncate_dim=size,
        max_new_tokens=longest,
        num_beams=num_beams,
        eos_token_id=sorted(ends) or None,
        pad_token_id=processor.tokenizer.pad_token_id,
        **settings,
        **prompts,
    )
    return processor.decode_answers(token_ids)


@torch.no_grad()
def embed_texts(alignment: EdgeGlassModel, processor: EdgeGlassDecodingProcessor, texts: Sequence[str]) -> Tensor:
    """Embeddings (N, D) of texts by an alignment."""
    # Of empty texts alone some tokenizers make no tokens, and no tower takes a batch without any.
    inputs = processor.alignment_processor(text=[*texts, "."]).to(alignment.device)
    return alignment.get_text_features(**inputs)[:-1]


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
