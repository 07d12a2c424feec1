"""EdgeGlassDecodingProcessor: pictures, prompts and answers as a decoding model wants them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.feature_extraction_utils import BatchFeature

from .language_models import IGNORED_LABEL
from .processing_edgeglass import EdgeGlassProcessor


class EdgeGlassDecodingProcessor(ProcessorMixin):
    """The image processor and the tokenizer of an alignment, and the tokenizer of a language model.

    `processor(images=..., text=...)` gives the inputs of `EdgeGlassForConditionalGeneration.generate`. Prompts go
    through the chat template of the language model's tokenizer where it has one.

    Args:
        image_processor: The alignment's.
        tokenizer: The language model's.
        alignment_tokenizer: The alignment's, which embeds captions.
        prompt: What the bridge was trained to be asked where there is no question.
        max_text_length: Longest answer in tokens, with the one that ends it.

    Raises:
        ValueError: The language model's tokenizer has neither a token for padding nor one that ends a text.
    """

    image_processor: Any
    tokenizer: Any
    alignment_tokenizer: Any

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        alignment_tokenizer: Any = None,
        prompt: str = "Describe the picture.",
        max_text_length: int = 128,
        **kwargs: Any,
    ) -> None:
        if tokenizer is not None and tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(
                    "the language model's tokenizer has no pad_token and no eos_token to take its place; set one"
                )
            tokenizer.pad_token = tokenizer.eos_token  # the attention mask hides it
        super().__init__(image_processor, tokenizer, alignment_tokenizer, **kwargs)
        self.prompt, self.max_text_length = prompt, max_text_length

    @classmethod
    def from_alignment_pretrained(
        cls,
        alignment: str,
        language_model: str,
        *,
        alignment_revision: str | None = None,
        language_revision: str | None = None,
        language_trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "EdgeGlassDecodingProcessor":
        """Join the processor of a trained alignment and the tokenizer of a language model.

        Args:
            alignment: Directory or id on the Hub of an alignment.
            language_model: Directory or id of a causal language model.
            alignment_revision: Commit, tag or branch on the Hub.
            language_revision: As for the alignment.
            language_trust_remote_code: Run tokenizer code that comes with the language model.
            **kwargs: Further arguments of the processor, such as `prompt`.

        Raises:
            ValueError: One of the two has no processor or no tokenizer.
        """
        try:
            aligned: Any = EdgeGlassProcessor.from_pretrained(alignment, revision=alignment_revision or "main")
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"alignment {alignment!r} has no processor that can be loaded: {reason}") from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                language_model, revision=language_revision, trust_remote_code=language_trust_remote_code
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"language model {language_model!r} has no tokenizer that can be loaded: {reason}"
            ) from error
        return cls(aligned.image_processor, tokenizer, aligned.tokenizer, **kwargs)

    @property
    def alignment_processor(self) -> EdgeGlassProcessor:
        """What makes the alignment's inputs."""
        return EdgeGlassProcessor(self.image_processor, self.alignment_tokenizer)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """`pixel_values` (B, 3, S, S) of pictures, `input_ids` and `attention_mask` (B, L) of prompts.

        Args:
            images: As for `EdgeGlassProcessor`.
            text: One prompt or a list of them, each in the words of a user; padded on the left.
            **kwargs: As for any transformers processor, for the pictures.
        """
        found = BatchFeature()
        if images is not None:
            found.update(self.alignment_processor(images=images, **kwargs))
        if text is not None:
            prompts = [self.prompt_ids(prompt) for prompt in ([text] if isinstance(text, str) else text)]
            found["input_ids"], found["attention_mask"] = self._pad(prompts, self.tokenizer.pad_token_id, "left")
        return found

    def prompt_ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, up to where the answer begins."""
        tokenizer: PreTrainedTokenizerBase = self.tokenizer
        if tokenizer.chat_template is not None:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # Qwen3's; the others know no such word
            )
            return tokenizer(str(text), add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"{prompt}\n" if prompt else "", add_special_tokens=False)["input_ids"]
        return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]

    def encode_answers(self, prompts: Sequence[str], answers: Sequence[str]) -> dict[str, Tensor]:
        """What the language model is trained on: prompts, each with its answer.

        Args:
            prompts: In the words of a user (B,).
            answers: What is to be said (B,); longer ones than `max_text_length` are cut, and not ended.

        Returns:
            `input_ids`, `attention_mask` and `labels` (B, L), padded on the right; labels are -100 but for answers.
        """
        tokenizer: PreTrainedTokenizerBase = self.tokenizer
        ended = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids, labels = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            asked = self.prompt_ids(prompt)
            said = [*tokenizer(answer, add_special_tokens=False)["input_ids"], *ended][: self.max_text_length]
            ids.append(asked + said)
            labels.append([IGNORED_LABEL] * len(asked) + said)
        input_ids, attention_mask = self._pad(ids, tokenizer.pad_token_id, "right")
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": self._pad(labels, IGNORED_LABEL, "right")[0],
        }

    def decode_answers(self, token_ids: Tensor) -> list[str]:
        """What `generate` said (B, L), as text."""
        texts = self.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @staticmethod
    def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> tuple[Tensor, Tensor]:
        """Rows as one tensor (B, L), and where it is real."""
        length = max(map(len, rows))
        padded, real = torch.full((len(rows), length), value), torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            padded[i, place], real[i, place] = torch.tensor(row, dtype=torch.long), 1
        return padded, real
