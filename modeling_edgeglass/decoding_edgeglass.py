"""EdgeGlassForConditionalGeneration: a language model puts an embedding into words."""

import copy
import inspect
import os
import random
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.generation import RepetitionPenaltyLogitsProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from .bridge import Bridge
from .configuration_edgeglass import EdgeGlassDecodingConfig, refuse_unknown_fields
from .language_models import (
    IGNORED_LABEL,
    add_adapters,
    build_language_model,
    load_language_model,
    num_predicting,
)
from .matryoshka import truncate_embeds
from .modeling_edgeglass import EdgeGlassModel, EdgeGlassPreTrainedModel

BRIDGE_FILE = "bridge.safetensors"

_CHUNK = 4096  # tokens of a vocabulary that are looked at together


def bridge_file(name_or_path: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """The weights that `save_bridge_only` wrote to a directory or that a repository holds; None where there are none.

    Raises:
        OSError: There is no such repository, or the Hub cannot be reached.
    """
    found: str | None = cached_file(
        name_or_path, BRIDGE_FILE, revision=revision, _raise_exceptions_for_missing_entries=False
    )
    return found


class EdgeGlassForConditionalGeneration(EdgeGlassPreTrainedModel, GenerationMixin):
    """A frozen alignment, a bridge and a causal language model: picture -> embedding -> soft prefix -> words.

    The prefix stands in front of the prompt's tokens. What is embedded may as well be a caption, and any prefix of an
    embedding can be decoded: cut, scaled to unit length and filled up with zeros it goes through the same bridge.

    Args:
        config: The configuration of all three.
        alignment: The alignment to use; None makes one with random weights.
        language_model: Likewise.

    Raises:
        ValueError: `language_training` is `"lora"` and peft is not installed.
    """

    config: EdgeGlassDecodingConfig  # type: ignore[assignment]
    config_class = EdgeGlassDecodingConfig  # type: ignore[assignment]
    base_model_prefix = "decoder"
    accepts_loss_kwargs = True  # the loss is a mean over the answer's tokens of all micro-batches of a step

    def __init__(
        self,
        config: EdgeGlassDecodingConfig,
        alignment: EdgeGlassModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.alignment = alignment or EdgeGlassModel(config.alignment_config)
        self.language_model = language_model or build_language_model(config)
        config.alignment_config, config.text_config = self.alignment.config, self.language_model.config
        self.generation_config = self.language_model.generation_config  # its end tokens, kept with the whole
        embeddings: Any = self.language_model.get_input_embeddings()
        width = embeddings.weight.shape[1]
        self.bridge = Bridge(self.alignment.config.projection_dim, width, config.num_prefix_tokens)
        self.num_calls = 0
        self.post_init()
        if config.language_training == "lora":
            add_adapters(self.language_model, config)  # behind post_init, which would start them as any layer
        self.train(self.training)

    @classmethod
    def from_alignment_pretrained(
        cls,
        alignment: str,
        language_model: str,
        *,
        alignment_revision: str | None = None,
        language_revision: str | None = None,
        language_trust_remote_code: bool = False,
        load_in_4bit: bool = False,
        dtype: torch.dtype | str = "auto",
        **config: Any,
    ) -> "EdgeGlassForConditionalGeneration":
        """Join a trained alignment and a language model; the bridge is new and wants training.

        Args:
            alignment: Directory or id on the Hub of an `EdgeGlassModel`.
            language_model: Directory or id of a causal language model.
            alignment_revision: Commit, tag or branch on the Hub.
            language_revision: As for the alignment.
            language_trust_remote_code: Run model code that comes with the language model.
            load_in_4bit: Keep the language model's weights in 4 bits, on the GPU; wants bitsandbytes. The rest is
                left on the CPU; Trainer moves it.
            dtype: Precision of the language model; `"auto"` takes the checkpoint's own. The bridge is float32.
            **config: Fields of `EdgeGlassDecodingConfig`.

        Raises:
            ValueError: One of the two cannot be loaded, or a field has no possible value.
        """
        refuse_unknown_fields(EdgeGlassDecodingConfig, config)
        try:
            aligned = EdgeGlassModel.from_pretrained(alignment, revision=alignment_revision or "main")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"alignment {alignment!r} cannot be loaded: {str(error).strip().splitlines()[0]}"
            ) from error
        language = load_language_model(
            language_model,
            revision=language_revision,
            trust_remote_code=language_trust_remote_code,
            load_in_4bit=load_in_4bit,
            dtype=dtype,
        )
        decoding_config = EdgeGlassDecodingConfig(
            alignment_config=aligned.config.to_dict(),
            text_config=language.config.to_dict(),
            alignment_name_or_path=alignment,
            alignment_revision=getattr(aligned.config, "_commit_hash", None) or alignment_revision,
            language_name_or_path=language_model,
            language_revision=getattr(language.config, "_commit_hash", None) or language_revision,
            **config,
        )
        model = cls(decoding_config, aligned, language)
        model.bridge.token_scale.fill_(model._root_mean_square_token())
        return model

    @torch.no_grad()
    def _root_mean_square_token(self) -> Tensor:
        """Of the numbers in the language model's input embeddings, as it scales them."""
        embeddings: Any = self.get_input_embeddings()
        ids = torch.arange(len(embeddings.weight), device=embeddings.weight.device)
        squares = [embeddings(chunk).float().square().sum() for chunk in ids.split(_CHUNK)]
        return (torch.stack(squares).sum() / embeddings.weight.numel()).sqrt()

    @classmethod
    def from_bridge_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        alignment: str | None = None,
        language_model: str | None = None,
        **loading: Any,
    ) -> "EdgeGlassForConditionalGeneration":
        """Load what `save_bridge_only` wrote, and the alignment and the language model by the names in it.

        Args:
            name_or_path: Its directory, or id on the Hub.
            revision: Commit, tag or branch on the Hub.
            alignment: Directory or id in the place of the one in the config.
            language_model: Likewise.
            **loading: `dtype`, `load_in_4bit` and `language_trust_remote_code`, as for `from_alignment_pretrained`.

        Raises:
            ValueError: It holds no bridge, or the bridge is of another alignment or language model.
        """
        path = bridge_file(name_or_path, revision)
        if path is None:
            raise ValueError(f"{name_or_path} holds no {BRIDGE_FILE}; save_bridge_only writes one")
        config = EdgeGlassDecodingConfig.from_pretrained(name_or_path, revision=revision or "main")
        kept = ("num_prefix_tokens", "language_training", "lora_rank", "lora_alpha", "lora_target_modules")
        model = cls.from_alignment_pretrained(
            alignment or str(config.alignment_name_or_path),
            language_model or str(config.language_name_or_path),
            alignment_revision=None if alignment else config.alignment_revision,
            language_revision=None if language_model else config.language_revision,
            decoding_seed=config.decoding_seed,
            **{name: getattr(config, name) for name in kept},
            **loading,
        )
        state = load_file(path)
        shapes, own = (
            {name: tuple(value.shape) for name, value in of.items()} for of in (state, model.trained_state_dict())
        )
        if wrong := sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name)):
            raise ValueError(
                f"the bridge in {name_or_path} has {wrong[0]} of shape {shapes.get(wrong[0])}, and one from "
                f"{model.config.alignment_name_or_path} to {model.config.language_name_or_path} has "
                f"{own.get(wrong[0])}: it was trained for another alignment or language model; give the ones it was "
                "trained for"
            )
        model.load_trained_state_dict(state)
        return model

    def save_bridge_only(self, folder: str | os.PathLike[str]) -> None:
        """Write the config, the bridge and the adapters; the rest is found again by the names in the config.

        Raises:
            ValueError: The whole language model was trained, or it is not known where a part came from.
        """
        if self.config.language_training == "full":
            raise ValueError("the whole language model was trained: save_pretrained keeps it")
        if not (self.config.alignment_name_or_path and self.config.language_name_or_path):
            raise ValueError("alignment_name_or_path and language_name_or_path say what a bridge joins; set them")
        self.config.save_pretrained(folder)
        state = {name: value.contiguous() for name, value in self.trained_state_dict().items()}
        save_file(state, Path(folder) / BRIDGE_FILE, metadata={"format": "pt"})

    def train(self, mode: bool = True) -> "EdgeGlassForConditionalGeneration":
        """As for any module; the alignment, and the language model unless it trains, stay in eval mode.

        What does not train gets no gradients; here, because `from_pretrained` makes new parameters with gradients and
        ends in `eval()`.
        """
        super().train(mode)
        self.alignment.eval()
        if self.config.language_training == "frozen":
            self.language_model.eval()
            for module in self.language_model.modules():
                if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                    module.training = mode  # in eval mode it keeps its activations; its children stay there
        for name, parameter in self.named_parameters():
            if not self._trains(name):
                parameter.requires_grad_(False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_output_embeddings()

    def trained_state_dict(self) -> dict[str, Tensor]:
        """The weights that training changes: the bridge, and the language model's adapters or all of it."""
        distinct = {name for named in (self.named_parameters(), self.named_buffers()) for name, _ in named}
        return {name: value for name, value in self.state_dict().items() if name in distinct and self._trains(name)}

    def load_trained_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take what `trained_state_dict` gave.

        Raises:
            ValueError: A weight is missing or is none of this model's.
        """
        if wrong := sorted(set(state) ^ set(self.trained_state_dict())):
            raise ValueError(f"the weights are not this model's: {wrong[0]} and {len(wrong) - 1} others differ")
        self.load_state_dict(state, strict=False)

    def _trains(self, name: str) -> bool:
        if not name.startswith("language_model."):
            return name.startswith("bridge.")
        return {"frozen": False, "lora": "lora_" in name, "full": True}[self.config.language_training]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        step: int | None = None,
        *,
        image_embeds: Tensor | None = None,
        text_embeds: Tensor | None = None,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Score the tokens behind an embedding.

        Args:
            pixel_values: Pictures (B, 3, S, S); or one of the two below in their place.
            input_ids: Token ids of prompt and answer (B, L), padded on either side.
            attention_mask: 1 for a real token, 0 for padding (B, L).
            labels: `input_ids` where they are to be predicted, -100 elsewhere (B, L).
            step: Optimizer step, which decides the size that is drawn in training; None counts the calls instead.
            image_embeds: Embeddings of pictures (B, D).
            text_embeds: Embeddings of captions (B, D).
            truncate_dim: Numbers of each embedding that are read, 1..D; None draws one of `config.sizes` in train
                mode, and takes all in eval mode.
            **kwargs: Handed to the language model, such as `num_items_in_batch` or `output_hidden_states`;
                `logits_to_keep` if it knows it.

        Returns:
            What the language model returns. Its tokens are the prefix, then the real ones, then the padding; `logits`
            are (B, P + L, vocabulary), and with `labels` those alone that predict one and what follows, if the
            language model has `logits_to_keep`: a vocabulary is most of the work in a small one. `loss` is the mean
            over the labels.

        Raises:
            ValueError: Not exactly one input is given to be described; or there are more tokens than positions.
        """
        embeds = self._embeds(pixel_values, image_embeds, text_embeds)
        if self.training:
            step, self.num_calls = self.num_calls if step is None else step, self.num_calls + 1
            truncate_dim = truncate_dim or self._draw(step)
        inputs = self._inputs(embeds, truncate_dim, input_ids, attention_mask, labels, pad="right")
        if not self._keeps_last_logits:
            kwargs.pop("logits_to_keep", None)
        elif labels is not None:
            kwargs["logits_to_keep"] = num_predicting(inputs["labels"])
            inputs["labels"] = inputs["labels"][:, -kwargs["logits_to_keep"] :]
        return self.language_model(**inputs, **({"use_cache": False} | kwargs))

    @property
    def _keeps_last_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.language_model.forward).parameters

    def _draw(self, step: int) -> int:
        return random.Random(f"{self.config.decoding_seed}/{step}/decoding_size").choice(self.config.sizes)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_embeds: Tensor | None = None,
        text_embeds: Tensor | None = None,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Describe pictures, or what was embedded.

        Args:
            pixel_values: Pictures (B, 3, S, S); or one of the two below in their place.
            input_ids: Token ids of the prompts (B, L), or of one prompt for all (1, L), padded on either side; None
                has the language model go on from the prefix alone.
            attention_mask: 1 for a real token, 0 for padding, as `input_ids`.
            image_embeds: Embeddings of pictures (B, D).
            text_embeds: Embeddings of captions (B, D).
            truncate_dim: Numbers of each embedding that are read, 1..D; None takes all.
            **kwargs: As for any transformers model: `max_new_tokens`, `do_sample`, `num_beams`, ... Keys and values
                are always cached: transformers knows no other way behind embeddings.

        Returns:
            Ids of the new tokens (B * num_return_sequences, at most max_new_tokens), or what `generate` returns when
            it is asked for a dict.

        Raises:
            ValueError: Not exactly one input is given to be described; or there are more tokens than positions.
        """
        embeds = self._embeds(pixel_values, image_embeds, text_embeds)
        if input_ids is not None and len(input_ids) == 1:
            input_ids = input_ids.expand(len(embeds), -1)
            attention_mask = None if attention_mask is None else attention_mask.expand(len(embeds), -1)
        inputs = self._inputs(embeds, truncate_dim, input_ids, attention_mask, None, pad="left")
        prompt_length = 0 if input_ids is None else input_ids.shape[1]
        generation = copy.deepcopy(kwargs.pop("generation_config", None) or self.generation_config)
        kwargs = generation.update(**kwargs)  # what is no setting of it, such as a streamer
        self._check_length(prompt_length + (generation.max_new_tokens or 0))
        if (generation.repetition_penalty or 1.0) != 1.0:
            # transformers' own spares as many new tokens as a prompt has padding: behind embeddings it sees no others.
            penalty = RepetitionPenaltyLogitsProcessor(generation.repetition_penalty)
            kwargs["logits_processor"] = LogitsProcessorList([penalty, *(kwargs.get("logits_processor") or [])])
            generation.repetition_penalty = 1.0
        return self.language_model.generate(**inputs, generation_config=generation, **kwargs)  # type: ignore[operator]

    def _embeds(self, pixel_values: Tensor | None, image_embeds: Tensor | None, text_embeds: Tensor | None) -> Tensor:
        """What is to be described (B, D)."""
        given = [value for value in (pixel_values, image_embeds, text_embeds) if value is not None]
        if len(given) != 1:
            raise ValueError(f"give one of pixel_values, image_embeds and text_embeds, got {len(given)}")
        if pixel_values is not None:
            return self.alignment.get_image_features(pixel_values)
        size = self.config.alignment_config.projection_dim
        if given[0].shape[1] != size:
            raise ValueError(
                f"embeddings have {given[0].shape[1]} numbers, and the bridge reads {size}: give whole ones, and "
                "truncate_dim to read fewer"
            )
        return given[0]

    def _inputs(
        self,
        embeds: Tensor,
        truncate_dim: int | None,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        pad: Literal["left", "right"],
    ) -> dict[str, Tensor]:
        """Prefix, then real tokens, all padding on one side of them: positions and windows know no gaps then."""
        kept = truncate_embeds(embeds, truncate_dim)
        prefix = self.bridge(F.pad(kept, (0, embeds.shape[1] - kept.shape[1])))
        if input_ids is None:
            input_ids = torch.empty(len(embeds), 0, dtype=torch.long, device=embeds.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        tokens = self.language_model.get_input_embeddings()(input_ids)
        tokens = torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
        attention_mask = F.pad(attention_mask, (prefix.shape[1], 0), value=1)
        self._check_length(input_ids.shape[1])
        order = attention_mask.argsort(dim=1, stable=True, descending=pad == "right")
        inputs = {
            "inputs_embeds": tokens.gather(1, order.unsqueeze(2).expand_as(tokens)),
            "attention_mask": attention_mask.gather(1, order),
        }
        if labels is not None:
            labels = F.pad(labels, (prefix.shape[1], 0), value=IGNORED_LABEL)
            labels = labels.masked_fill(attention_mask == 0, IGNORED_LABEL)
            inputs["labels"] = labels.gather(1, order)
        return inputs

    def _check_length(self, length: int) -> None:
        limit = self.config.max_text_tokens
        if limit is not None and length > limit:
            raise ValueError(
                f"prompt and answer are {length} tokens, and the language model has positions for {limit} behind the "
                "prefix: cut the text, or set fewer num_prefix_tokens"
            )
