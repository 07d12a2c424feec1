"""What a decoding run reads: pictures or captions, questions and answers."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from modeling_edgeglass import EdgeGlassDecodingProcessor, EdgeGlassProcessor
from tests.conftest import picture, write_pairs
from tests.language_models import save_tiny_language_model
from tests.towers import IMAGE_SIZE
from training.decoding.config import DecodingConfig, load_decoding_config
from training.decoding.data import AnswersCollator, AnswersDataset, build_answers_datasets
from training.errors import DataError
from training.transforms import get_image_transforms

EVAL = get_image_transforms(IMAGE_SIZE, is_training=False)


@pytest.fixture
def processor(vision_dir: str, text_dir: str, tmp_path: Path) -> EdgeGlassDecodingProcessor:
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(tmp_path / "alignment")
    language = save_tiny_language_model(tmp_path / "language")
    return EdgeGlassDecodingProcessor.from_alignment_pretrained(str(tmp_path / "alignment"), language)


def write_questions(path: Path) -> Path:
    answers = ["A red dot.", "Two.", " "]
    table = {
        "image_bytes": [picture(answer) for answer in answers],
        "question": ["What is it?", " ", None],
        "answer": answers,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return path


def config_of(tmp_path: Path, **dataset: str) -> DecodingConfig:
    path = tmp_path / "decoding.yaml"
    path.write_text("decoding: {alignment: model}\ntrainer: {output_dir: out}\n")
    return load_decoding_config(path, [f"dataset.{key}={value}" for key, value in dataset.items()])


def test_captions_answer_the_prompt_and_answers_their_question(tmp_path: Path):
    captions = AnswersDataset(write_pairs(tmp_path / "a.parquet", 3), EVAL, prompt="What?")
    assert [(captions[i]["question"], captions[i]["answer"]) for i in range(2)] == [
        ("What?", "red dot number 0"),
        ("What?", "green dot number 1"),
    ]
    assert captions[0]["image"].shape == (3, IMAGE_SIZE, IMAGE_SIZE)
    answers = AnswersDataset(write_questions(tmp_path / "b.parquet"), EVAL, prompt="What?", for_evaluation=True)
    assert [(answers[i]["question"], answers[i]["answer"], answers[i]["is_valid"]) for i in range(3)] == [
        ("What is it?", "A red dot.", True),
        ("What?", "Two.", True),
        ("What?", "", False),
    ]


def test_text_in_the_place_of_pictures_wants_none(tmp_path: Path, processor):
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["a dot", "a red box"]}), tmp_path / "text.parquet")
    dataset = AnswersDataset(tmp_path / "text.parquet", EVAL, source="text")
    assert "image" not in dataset[0]
    batch = AnswersCollator(processor)([dataset[0], dataset[1]])
    expected = processor.alignment_processor(text=["a dot", "a red box"])
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch["caption_inputs"][name], expected[name])
    assert batch["answers"] == ["a dot", "a red box"]
    assert len(AnswersDataset(tmp_path / "text.parquet", EVAL, source="text", image_column="picture")) == 2
    with pytest.raises(DataError, match=r"no image column \(image_bytes, image, jpg\)"):
        AnswersDataset(tmp_path / "text.parquet", EVAL)


def test_pictures_are_not_decoded_where_captions_take_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dataset = AnswersDataset(write_pairs(tmp_path / "a.parquet", 3), EVAL, source="text")
    monkeypatch.setattr(AnswersDataset, "pixels", lambda *_: pytest.fail("a picture was decoded"))
    assert dataset[1]["answer"] == "green dot number 1"


def test_a_batch_holds_what_is_asked_and_said(tmp_path: Path, processor):
    dataset = AnswersDataset(write_questions(tmp_path / "a.parquet"), EVAL, for_evaluation=True)
    processor.max_text_length = 5
    batch = AnswersCollator(processor)([dataset[i] for i in range(3)])
    assert batch["pixel_values"].shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    said = [row[row != -100] for row in batch["labels"]]
    assert [len(row) for row in said] == [5, 5, 1]  # cut, ended, and the end alone of the bad row
    assert said[1].tolist() == [*processor.tokenizer("Two.", add_special_tokens=False)["input_ids"], 3]
    assert batch["is_valid"].tolist() == [True, True, False]
    assert len(set(batch["image_ids"].tolist())) == 3
    assert [bad.row for bad in batch["bad_samples"]] == [2]
    assert batch["sample_ids"] == ["0", "1", "2"]


def test_a_question_that_does_not_fit_is_named(tmp_path: Path, processor):
    dataset = AnswersDataset(write_questions(tmp_path / "a.parquet"), EVAL)
    processor.max_text_length = 5
    fits = len(processor.prompt_ids("What is it?")) + 5
    assert AnswersCollator(processor, max_text_tokens=fits)([dataset[0]])["input_ids"].shape == (1, fits)
    with pytest.raises(DataError, match=rf"sample_id 0: question and answer are {fits} tokens, .* {fits - 1} behind"):
        AnswersCollator(processor, max_text_tokens=fits - 1)([dataset[0]])


def test_the_sets_of_a_run(tmp_path: Path):
    files = {"train_parquet": write_pairs(tmp_path / "t.parquet", 5), "val_parquet": write_pairs(tmp_path / "v", 3)}
    config = config_of(tmp_path, **files, source="text", prompt="Say.")
    built = build_answers_datasets(config, train_transforms=EVAL, val_transforms=EVAL, seed=1)
    assert (built["train"].towers, built["val"].towers) == (("text",), ("vision",))
    assert built["val"][0]["question"] == "Say."
    assert built["val"].for_evaluation
    one = config_of(tmp_path, **files | {"val_parquet": write_pairs(tmp_path / "one", 1)})
    with pytest.raises(DataError, match="one picture is no val set"):
        build_answers_datasets(one, train_transforms=EVAL, val_transforms=EVAL, seed=1)
