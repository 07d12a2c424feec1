"""A language model reads an embedding: laws of the bridge, of generation and of what is kept."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_edgeglass import (
    EdgeGlassConfig,
    EdgeGlassDecodingConfig,
    EdgeGlassForConditionalGeneration,
    truncate_embeds,
)
from modeling_edgeglass.decoding_edgeglass import BRIDGE_FILE
from tests.language_models import FAMILIES, tiny_language_config

LENGTHS = (6, 4, 3)  # of the prompts


def make_decoder(config: EdgeGlassConfig, family: str = "qwen3", **options) -> EdgeGlassForConditionalGeneration:
    torch.manual_seed(0)
    sections = {"alignment_config": config.to_dict(), "text_config": tiny_language_config(family)}
    return EdgeGlassForConditionalGeneration(
        EdgeGlassDecodingConfig(**sections, **({"num_prefix_tokens": 4} | options))
    ).eval()


@pytest.fixture
def decoder(config: EdgeGlassConfig) -> EdgeGlassForConditionalGeneration:
    return make_decoder(config)


@pytest.fixture
def embeds() -> Tensor:
    return F.normalize(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.fixture
def prompts() -> dict[str, Tensor]:
    """Three, padded on the left."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(6) >= 6 - torch.tensor(LENGTHS)[:, None]
    return {"input_ids": torch.randint(4, 90, (3, 6), generator=generator) * mask, "attention_mask": mask.long()}


def to_the_right(prompts: dict[str, Tensor]) -> dict[str, Tensor]:
    order = prompts["attention_mask"].argsort(dim=1, stable=True, descending=True)
    return {name: value.gather(1, order) for name, value in prompts.items()}


def next_log_probs(decoder, embeds: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Of the token behind each row (B, vocabulary), from the whole sequence, without cache; none ends it."""
    logits = decoder(image_embeds=embeds, input_ids=ids, attention_mask=mask).logits
    last = decoder.config.num_prefix_tokens + mask.sum(dim=1) - 1
    log_probs = logits[torch.arange(len(ids)), last].detach().log_softmax(dim=1)
    log_probs[:, decoder.generation_config.eos_token_id] = -torch.inf
    return log_probs


def say_without_cache(decoder, embeds: Tensor, prompts: dict[str, Tensor], choose, num_tokens: int) -> Tensor:
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    for _ in range(num_tokens):
        chosen = choose(next_log_probs(decoder, embeds, ids, mask))
        ids, mask = torch.cat([ids, chosen], dim=1), torch.cat([mask, torch.ones_like(chosen)], dim=1)
    return ids[:, -num_tokens:]


def search_without_cache(decoder, embeds: Tensor, prompts: dict[str, Tensor], width: int, num_tokens: int) -> Tensor:
    """The best sequence of a row, the `width` best of which are followed at each step (1, num_tokens)."""
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    scores = torch.zeros(1)
    for _ in range(num_tokens):
        further = scores[:, None] + next_log_probs(decoder, embeds.expand(len(ids), -1), ids, mask)
        scores, best = further.flatten().topk(width)
        beam, token = best // further.shape[1], best % further.shape[1]
        ids = torch.cat([ids[beam], token[:, None]], dim=1)
        mask = torch.cat([mask[beam], torch.ones_like(token[:, None])], dim=1)
    return ids[:1, -num_tokens:]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_changes_no_token(config, family: str, embeds: Tensor, prompts):
    decoder = make_decoder(config, family)
    options = {"max_new_tokens": 24, "min_new_tokens": 24}
    said = decoder.generate(image_embeds=embeds, **prompts, do_sample=False, **options)
    greedy = say_without_cache(decoder, embeds, prompts, lambda p: p.argmax(dim=1, keepdim=True), 24)
    assert torch.equal(said, greedy)

    torch.manual_seed(0)
    said = decoder.generate(image_embeds=embeds, **prompts, do_sample=True, temperature=2.0, top_k=0, **options)
    torch.manual_seed(0)
    drawn = say_without_cache(decoder, embeds, prompts, lambda p: (p / 2).softmax(dim=1).multinomial(1), 24)
    assert torch.equal(said, drawn)
    assert not torch.equal(said, greedy)

    said = decoder.generate(image_embeds=embeds, **prompts, do_sample=False, num_beams=3, **options)
    for i in range(3):
        row = {name: value[[i]] for name, value in prompts.items()}
        assert torch.equal(said[[i]], search_without_cache(decoder, embeds[[i]], row, 3, 24))


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_differing_prompts_says_what_each_alone_does(
    config, family: str, penalty: float, embeds: Tensor, prompts
):
    decoder = make_decoder(config, family)
    decoder.generation_config.repetition_penalty = penalty  # as Qwen2.5-Instruct has one
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    together = decoder.generate(image_embeds=embeds, **prompts, **options)
    assert torch.equal(decoder.generate(image_embeds=embeds, **to_the_right(prompts), **options), together)
    for i, length in enumerate(LENGTHS):
        alone = decoder.generate(image_embeds=embeds[[i]], input_ids=prompts["input_ids"][[i], -length:], **options)
        assert torch.equal(alone[0], together[i])


def test_sequences_asked_for_and_one_prompt_for_all(decoder, embeds: Tensor, prompts):
    one = {"input_ids": prompts["input_ids"][:1]}
    said = decoder.generate(
        image_embeds=embeds, **one, do_sample=True, num_return_sequences=2, max_new_tokens=5, min_new_tokens=5
    )
    assert said.shape == (6, 5)
    alone = decoder.generate(image_embeds=embeds, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert alone.shape == (3, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_each_sequence_without_padding(config, family: str, embeds: Tensor, prompts):
    decoder = make_decoder(config, family)
    labels = prompts["input_ids"].masked_fill(torch.arange(6) < 4, -100)
    whole = decoder(image_embeds=embeds, **prompts, labels=labels)
    losses = []
    for i, length in enumerate(LENGTHS):
        ids = prompts["input_ids"][i, -length:]
        tokens = torch.cat([decoder.bridge(embeds[[i]]), decoder.get_input_embeddings()(ids)[None]], dim=1)
        logits = decoder.language_model(inputs_embeds=tokens).logits[0]
        losses += [F.cross_entropy(logits[3 + place], ids[place]) for place in range(length - 2, length)]
    assert whole.loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    right = to_the_right(prompts | {"labels": labels})
    assert decoder(image_embeds=embeds, **right).loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)


def test_labels_of_padding_count_for_nothing(decoder, embeds: Tensor, prompts):
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    masked = decoder(image_embeds=embeds, **prompts, labels=ids.masked_fill(mask == 0, -100))
    assert decoder(image_embeds=embeds, **prompts, labels=ids).loss == masked.loss


@pytest.mark.parametrize("size", [8, 20, 64])
def test_a_size_reads_the_first_numbers_alone(decoder, embeds: Tensor, prompts, size: int):
    changed = torch.cat([embeds[:, :size], torch.randn(3, 64 - size)], dim=1)
    logits = decoder(image_embeds=embeds, **prompts, truncate_dim=size).logits
    assert torch.equal(decoder(image_embeds=changed, **prompts, truncate_dim=size).logits, logits)
    filled = F.pad(truncate_embeds(embeds, size), (0, 64 - size))
    torch.testing.assert_close(decoder(image_embeds=filled, **prompts).logits, logits)


def test_pictures_and_captions_are_read_through_their_embeddings(decoder, batch, prompts):
    pictures, captions = batch["pixel_values"][:3], batch["input_ids"][:3]
    image_embeds = decoder.alignment.get_image_features(pictures)
    logits = decoder(pictures, **prompts).logits
    assert torch.equal(decoder(image_embeds=image_embeds, **prompts).logits, logits)
    text_embeds = decoder.alignment.get_text_features(captions, batch["attention_mask"][:3])
    assert not torch.allclose(decoder(text_embeds=text_embeds, **prompts).logits, logits)
    for given in ({}, {"pixel_values": pictures, "image_embeds": image_embeds}):
        with pytest.raises(ValueError, match=f"one of pixel_values, image_embeds and text_embeds, got {len(given)}"):
            decoder(**given, **prompts)


def test_training_draws_a_size_by_the_step(decoder, embeds: Tensor, prompts):
    def loss(**options) -> float:
        return decoder(image_embeds=embeds, **prompts, labels=prompts["input_ids"], **options).loss.item()

    by_size = {size: loss(truncate_dim=size) for size in (64, 32, 16, 8)}
    assert loss() == by_size[64]
    assert len(set(by_size.values())) == 4
    decoder.train()
    drawn = [loss(step=step) for step in range(40)]
    assert set(drawn) == set(by_size.values())
    assert [loss(step=step) for step in range(40)] == drawn
    decoder.num_calls = 0
    assert [loss() for _ in range(40)] == drawn


@pytest.mark.parametrize("training", ["frozen", "lora", "full"])
def test_what_trains_gets_a_gradient_and_is_what_is_kept(config, embeds: Tensor, prompts, training: str):
    decoder = make_decoder(config, language_training=training).train()
    assert not decoder.alignment.training
    assert decoder.language_model.training == (training != "frozen")
    decoder(image_embeds=embeds, **prompts, labels=prompts["input_ids"]).loss.backward()
    assert {name for name, parameter in decoder.named_parameters() if parameter.requires_grad} | {
        "bridge.token_scale"
    } == set(decoder.trained_state_dict())
    moved = {name for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    assert moved | {"bridge.token_scale"} == set(decoder.trained_state_dict())
    assert all(name.startswith(("bridge.", "language_model.")) for name in moved)
    assert any("lora_" in name for name in moved) == (training == "lora")
    assert any("embed_tokens" in name for name in moved) == (training == "full")


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])  # the second has its embedding twice, tied
@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_a_whole_model_comes_back_as_it_was(config, embeds, prompts, tmp_path: Path, family: str, training: str):
    decoder = make_decoder(config, family, language_training=training)
    randomise(decoder)
    decoder.save_pretrained(tmp_path)
    loaded = EdgeGlassForConditionalGeneration.from_pretrained(tmp_path)
    for size in (64, 8):
        options = {"image_embeds": embeds, **prompts, "truncate_dim": size}
        assert torch.equal(loaded(**options).logits, decoder(**options).logits)
    trains = [{name for name, value in m.named_parameters() if value.requires_grad} for m in (loaded.train(), decoder)]
    assert trains[0] == trains[1]


def test_adapters_start_as_no_change_and_in_float32(parts, embeds: Tensor, prompts):
    join, options = EdgeGlassForConditionalGeneration.from_alignment_pretrained, {"image_embeds": embeds, **prompts}
    plain, adapted = (join(*parts, language_training=training).eval() for training in ("frozen", "lora"))
    adapted.bridge.load_state_dict(plain.bridge.state_dict())
    assert torch.equal(adapted(**options).logits, plain(**options).logits)
    half = join(*parts, language_training="lora", dtype=torch.bfloat16)
    kinds = {"lora_" in name: value.dtype for name, value in half.language_model.named_parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_a_whole_model_keeps_the_ends_that_its_language_model_knows(parts, embeds: Tensor, prompts, tmp_path: Path):
    decoder = EdgeGlassForConditionalGeneration.from_alignment_pretrained(*parts).eval()
    options = {"image_embeds": embeds, **prompts, "max_new_tokens": 30, "do_sample": False}
    said = decoder.generate(**options, min_new_tokens=30)
    ends = [3, int(said[0, 4])]
    decoder.language_model.generation_config.eos_token_id = ends
    stopped = decoder.generate(**options)
    assert stopped[0, 5:].eq(0).all()
    decoder.save_pretrained(tmp_path / "whole")
    loaded = EdgeGlassForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert torch.equal(loaded.generate(**options), stopped)


def test_a_frozen_language_model_can_forget_its_activations(decoder, embeds: Tensor, prompts):
    calls = []
    layer = decoder.language_model.model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpoints in (False, True):
        if checkpoints:
            decoder.gradient_checkpointing_enable({"use_reentrant": False})
        decoder.train().zero_grad()
        calls.clear()
        decoder(image_embeds=embeds, **prompts, labels=prompts["input_ids"], truncate_dim=64).loss.backward()
        gradients.append(decoder.bridge.down.weight.grad.clone())
        assert len(calls) == (2 if checkpoints else 1)
    torch.testing.assert_close(*gradients)
    assert not layer.training


def randomise(decoder: EdgeGlassForConditionalGeneration) -> None:
    """All that trains; adapters start at zero."""
    for name, value in decoder.named_parameters():
        if name in decoder.trained_state_dict():
            torch.nn.init.normal_(value, std=0.1)


@pytest.mark.parametrize("training", ["frozen", "lora"])
def test_a_bridge_alone_finds_its_two_ends_again(parts, embeds: Tensor, prompts, tmp_path: Path, training: str):
    decoder = EdgeGlassForConditionalGeneration.from_alignment_pretrained(*parts, language_training=training).eval()
    randomise(decoder)
    decoder.save_bridge_only(tmp_path / "bridge")
    size = sum(path.stat().st_size for path in (tmp_path / "bridge").iterdir())
    assert size < 1.2 * sum(value.nbytes for value in decoder.trained_state_dict().values()) + 20_000
    loaded = EdgeGlassForConditionalGeneration.from_bridge_pretrained(tmp_path / "bridge").eval()
    options = {"image_embeds": embeds, **prompts}
    assert torch.equal(loaded(**options).logits, decoder(**options).logits)


def test_soft_tokens_start_as_long_as_tokens(parts, config, embeds: Tensor):
    decoder = EdgeGlassForConditionalGeneration.from_alignment_pretrained(*parts)
    tokens = decoder.get_input_embeddings().weight
    assert decoder.bridge.token_scale.item() == pytest.approx(tokens.square().mean().sqrt().item())
    scaled = make_decoder(config, "gemma3_text")  # by the square root of its width
    expected = scaled.get_input_embeddings().weight.square().mean().sqrt().item() * 32**0.5
    assert scaled._root_mean_square_token().item() == pytest.approx(expected, rel=1e-2)
    assert 0.2 < decoder.bridge(embeds).square().mean().sqrt() / decoder.bridge.token_scale < 2


def test_a_bridge_of_another_language_model_is_refused(parts, tmp_path: Path, config):
    decoder = EdgeGlassForConditionalGeneration.from_alignment_pretrained(*parts)
    decoder.save_bridge_only(tmp_path / "bridge")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    wider = tiny_language_config("qwen3", hidden_size=48)
    Qwen3ForCausalLM(Qwen3Config(**wider)).save_pretrained(tmp_path / "wider")
    with pytest.raises(ValueError, match="it was trained for another alignment or language model"):
        EdgeGlassForConditionalGeneration.from_bridge_pretrained(
            tmp_path / "bridge", language_model=str(tmp_path / "wider")
        )
    (tmp_path / "bridge" / BRIDGE_FILE).unlink()
    with pytest.raises(ValueError, match=f"holds no {re.escape(BRIDGE_FILE)}"):
        EdgeGlassForConditionalGeneration.from_bridge_pretrained(tmp_path / "bridge")
    with pytest.raises(ValueError, match="save_pretrained keeps it"):
        make_decoder(config, language_training="full").save_bridge_only(tmp_path / "full")
    with pytest.raises(ValueError, match="say what a bridge joins"):
        make_decoder(config).save_bridge_only(tmp_path / "nameless")


def test_a_misspelt_field_and_half_an_embedding_are_refused(parts, decoder, embeds: Tensor):
    with pytest.raises(ValueError, match="no config field 'num_prefix_token'; did you mean num_prefix_tokens"):
        EdgeGlassForConditionalGeneration.from_alignment_pretrained(*parts, num_prefix_token=3)
    with pytest.raises(
        ValueError, match="have 16 numbers, and the bridge reads 64: give whole ones, and truncate_dim"
    ):
        decoder(image_embeds=embeds[:, :16])


def test_what_cannot_be_joined_says_so(parts, tmp_path: Path, config, monkeypatch: pytest.MonkeyPatch):
    join = EdgeGlassForConditionalGeneration.from_alignment_pretrained
    with pytest.raises(ValueError, match=r"alignment '.*nowhere' cannot be loaded"):
        join(str(tmp_path / "nowhere"), parts[1])
    with pytest.raises(ValueError, match=r"language model '.*nowhere' cannot be loaded"):
        join(parts[0], str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="language_training must be one of frozen, lora, full, got 'some'"):
        join(*parts, language_training="some")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="load_in_4bit wants a CUDA GPU"):
        join(*parts, load_in_4bit=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="needs peft: pip install"):
        make_decoder(config, language_training="lora")


def test_more_tokens_than_positions_are_refused(decoder, embeds: Tensor):
    long = torch.full((3, 253), 5)
    with pytest.raises(ValueError, match="are 253 tokens, and the language model has positions for 252 behind the"):
        decoder(image_embeds=embeds, input_ids=long)
    with pytest.raises(ValueError, match="are 253 tokens"):
        decoder.generate(image_embeds=embeds, input_ids=long[:, :200], max_new_tokens=53)
    assert decoder(image_embeds=embeds, input_ids=long[:, 1:]).logits.shape[1] == 256


def test_the_loss_is_a_mean_over_the_tokens_of_all_micro_batches(decoder, embeds: Tensor, prompts):
    labels = prompts["input_ids"].masked_fill(prompts["attention_mask"] == 0, -100)
    whole = decoder(image_embeds=embeds, **prompts, labels=labels).loss
    count = int((labels != -100).sum())
    parts = [
        decoder(
            image_embeds=embeds[rows],
            **{name: value[rows] for name, value in prompts.items()},
            labels=labels[rows],
            num_items_in_batch=count,
        ).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
