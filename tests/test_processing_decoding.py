"""Prompts, answers and pictures as a decoding model wants them."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_edgeglass import EdgeGlassDecodingProcessor, EdgeGlassForConditionalGeneration

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"


@pytest.mark.parametrize("template", [None, CHAT])
def test_prompts_and_answers_go_the_way_of_the_tokenizer(parts, tmp_path: Path, template: str | None):
    processor = EdgeGlassDecodingProcessor.from_alignment_pretrained(*parts)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = template
    prompt = processor.prompt_ids("Say it.")
    text = "<user>Say it.</user><assistant>" if template else "Say it.\n"
    words = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt == (words if template else [tokenizer.bos_token_id, *words])
    encoded = processor.encode_answers(["Say it.", "Say."], ["a red box", "a dot"])
    for row, answer in enumerate(("a red box", "a dot")):
        labels = encoded["labels"][row]
        said = labels[labels != -100]
        assert said[-1] == tokenizer.eos_token_id
        assert said[:-1].tolist() == tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert torch.equal(encoded["input_ids"][row][labels != -100], said)
    assert encoded["input_ids"][0, : len(prompt)].tolist() == prompt
    assert (encoded["labels"][encoded["attention_mask"] == 0] == -100).all()
    processor.max_text_length = 2
    cut = processor.encode_answers(["Say it."], ["a red box"])
    assert (cut["labels"] != -100).sum() == 2
    processor.save_pretrained(tmp_path / "processor")
    loaded = EdgeGlassDecodingProcessor.from_pretrained(tmp_path / "processor")
    assert loaded.prompt_ids("Say it.") == prompt
    captions = ["a red box", "two"]
    for ours, theirs in zip(
        processor.alignment_processor(text=captions).values(),
        loaded.alignment_processor(text=captions).values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_a_processor_makes_what_generate_takes(parts):
    processor = EdgeGlassDecodingProcessor.from_alignment_pretrained(*parts)
    decoder = EdgeGlassForConditionalGeneration.from_alignment_pretrained(*parts).eval()
    images = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    inputs = processor(images=images, text=["Say it.", "What is this?"])
    said = processor.decode_answers(decoder.generate(**inputs, max_new_tokens=8, do_sample=False))
    assert len(said) == 2
    assert all(isinstance(text, str) for text in said)


def test_a_tokenizer_without_an_end_is_refused(parts):
    processor = EdgeGlassDecodingProcessor.from_alignment_pretrained(*parts)
    tokenizer = processor.tokenizer
    others = {"image_processor": processor.image_processor, "alignment_tokenizer": processor.alignment_tokenizer}
    tokenizer.pad_token = None
    assert EdgeGlassDecodingProcessor(tokenizer=tokenizer, **others).tokenizer.pad_token == "[SEP]"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no pad_token and no eos_token"):
        EdgeGlassDecodingProcessor(tokenizer=tokenizer, **others)
