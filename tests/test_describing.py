"""Having pictures described: what is said does not depend on batches, order or ranks, and what a run leaves of it."""

import json
import re
import sys
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from run_decoding import decode
from tests.commands import BIN, final_metrics, start
from tests.decoding_runs import make_decoding_trainer, write_decoding_config
from tests.interruptions import assert_equal_tensors
from tests.language_models import save_tiny_language_model
from training import caption, evaluate
from training.decoding.build import load_decoder, save_decoder
from training.decoding.config import load_decoding_config
from training.decoding.describing import Describer, embed_texts, nearest_text
from training.decoding.scores import RETRIEVAL_SCORES, TEXT_SCORES
from training.errors import CheckpointError, ConfigError
from training.signals import SignalListener
from training.visualization import Described, load_descriptions, save_descriptions

SCORES = (*TEXT_SCORES, *RETRIEVAL_SCORES)


@pytest.fixture
def decoding_config(vision_dir: str, text_dir: str, tmp_path: Path) -> Path:
    return write_decoding_config(tmp_path, vision_dir, text_dir)


def all_of(trainer, num_pictures: int = 6) -> tuple:
    describer = Describer(trainer, trainer.eval_dataset, num_pictures, trainer.generation)
    pictures = describer.embed()
    return pictures, describer.describe(pictures)


def test_what_is_said_of_a_picture_depends_on_no_other(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config, "trainer.per_device_eval_batch_size=4")
    pictures, said = all_of(trainer)
    assert pictures.rows == tuple(range(6))
    model, processor = trainer.model.eval(), trainer.processing_class
    for row, text in zip(pictures.rows, said.texts, strict=True):
        image, caption_of_row = trainer.eval_dataset.pair(row)
        assert pictures.answers[row] == caption_of_row
        inputs = processor(images=image, text="Say.")
        token_ids = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=0)
        assert processor.decode_answers(token_ids) == [text]
    assert len(set(said.texts)) > 1
    expected = embed_texts(model.alignment, processor, said.texts)
    torch.testing.assert_close(said.text_embeds, expected, rtol=1e-4, atol=1e-5)


def test_neither_a_longer_question_beside_it_nor_settings_of_the_language_model_change_an_answer(
    decoding_config: Path,
):
    path = decoding_config.parent / "val.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    asked = [row | {"question": "What " * (1 + 3 * (i % 3)), "answer": "a dot"} for i, row in enumerate(rows)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(asked), path)
    found = []
    for batch_size, penalty in ((6, 1.0), (6, 1.5), (1, 1.5)):
        settings = GenerationConfig(repetition_penalty=penalty, eos_token_id=3, pad_token_id=0)
        settings.save_pretrained(decoding_config.parent / "language")
        trainer = make_decoding_trainer(decoding_config, f"trainer.per_device_eval_batch_size={batch_size}")
        found.append(all_of(trainer)[1].texts)
    assert found[0] == found[1] == found[2]


def test_empty_texts_are_embedded_also_where_they_have_no_token(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config)
    alignment, processor = trainer.model.alignment.eval(), trainer.processing_class
    processor.alignment_tokenizer.backend_tokenizer.post_processor = None  # which put a token at both ends
    assert embed_texts(alignment, processor, ["", ""]).isfinite().all()
    alone, beside = (embed_texts(alignment, processor, texts)[0] for texts in (["a dot"], ["a dot", "", "a box"]))
    torch.testing.assert_close(alone, beside)


def test_a_set_whose_samples_are_bad_is_described_nowhere_and_training_goes_on(decoding_config: Path):
    path = decoding_config.parent / "val.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    rows[0]["image_bytes"] = b"no picture"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    options = ("dataset.max_bad_fraction=1", "generation.num_samples=1", "generation.num_scored=1")
    trainer = make_decoding_trainer(decoding_config, *options)
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.described == []
    assert "eval_perplexity" in metrics
    assert not any("cider" in name for name in metrics)
    assert {"training_curves.png", "lr_schedule.png"} <= {path.name for path in decoding_config.parent.glob("run/*")}
    assert not (decoding_config.parent / "run/descriptions.png").exists()


def test_of_one_picture_no_other_is_read(decoding_config: Path):
    metrics = make_decoding_trainer(decoding_config, "generation.num_scored=1").evaluate()
    assert "eval_cider@16" in metrics
    assert not any("other" in name for name in metrics)


def test_a_whole_decoder_is_loaded_and_keeps_its_parts(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config, "decoding.language_training=full")
    folder = decoding_config.parent / "model"
    save_decoder(trainer.model, folder)
    trainer.processing_class.save_pretrained(folder)
    model, _ = load_decoder(str(folder))
    assert_equal_tensors(model.state_dict(), trainer.model.state_dict())
    with pytest.raises(ConfigError, match="it is whole, and its parts cannot be exchanged: leave alignment out"):
        load_decoder(str(folder), alignment="another", language_model=None)
    state = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if "bridge.up" not in name}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ConfigError, match=r"it lacks 2 weights, such as bridge\.up"):
        load_decoder(str(folder))


def test_pictures_are_spread_over_the_set_and_bad_ones_left_out(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config)
    assert all_of(trainer, 3)[0].rows == (0, 2, 4)
    path = decoding_config.parent / "val.parquet"
    whole = pyarrow.parquet.read_table(path).to_pylist()
    whole[2]["image_bytes"] = b"no picture"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), path)
    damaged = make_decoding_trainer(decoding_config, "dataset.max_bad_fraction=1")
    assert all_of(damaged, 3)[0].rows == (0, 4)


def test_scores_are_there_at_every_size_but_in_training_samples_alone(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config)
    trainer.score_untrained(is_resumed=False)
    trainer.train()
    assert not any("cider" in name for entry in trainer.state.log_history for name in entry)
    assert len(trainer.described) == 6
    metrics = trainer.evaluate()
    named = {f"eval_{kind}{name}{size}" for name in SCORES for kind, size in
             (("", ""), ("", "@32"), ("", "@16"), ("other_", ""), ("untrained_", ""))}  # fmt: skip
    assert named <= metrics.keys()
    for name in named:
        assert 0 <= metrics[name] <= 10
    resumed = make_decoding_trainer(decoding_config)
    resumed.score_untrained(is_resumed=True)
    assert {f"eval_{name}": value for name, value in resumed._untrained.items()}.items() <= metrics.items()


def test_a_bridge_that_has_learnt_says_what_is_right_and_of_another_picture_what_is_wrong(decoding_config: Path):
    val = decoding_config.parent / "train.parquet"
    trainer = make_decoding_trainer(decoding_config, "trainer.epochs=60", f"dataset.val_parquet={val}",
                                    "decoding.language_training=full",
                                    "trainer.eval_strategy=no", "trainer.save_strategy=no")  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_exact_match"] > 0.8
    assert metrics["eval_other_exact_match"] < 0.2
    assert metrics["eval_cider_low"] > metrics["eval_other_cider_high"]


def test_a_run_leaves_the_bridge_its_words_and_its_numbers(
    decoding_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    config = load_decoding_config(decoding_config)
    assert decode(config, SignalListener()) == 0
    folder = decoding_config.parent / "run"
    left = {path.name for path in folder.iterdir()}
    assert {"descriptions.png", "descriptions.parquet", "training_curves.png", "lr_schedule.png", "report.html",
            "metrics.csv", "training_history.json", "config.yaml", "untrained_metrics.json"} <= left  # fmt: skip
    assert {path.name for path in (folder / "model").glob("*.safetensors")} == {"bridge.safetensors"}
    metrics = final_metrics(folder)
    table = capsys.readouterr().out
    for name in ("64", "32", "16", "another picture's", "untrained bridge"):
        assert re.search(rf"^ *{name}  ", table, re.MULTILINE), table
    assert f"{100 * metrics['val/cider@16']:.1f}" in table
    report = (folder / "report.html").read_text()
    assert "another picture&#39;s" in report
    assert "A language model that reads embeddings" in report
    with pytest.raises(ConfigError, match="holds a finished run"):
        decode(config, SignalListener())

    command = ["evaluate", folder / "model", decoding_config.parent / "val.parquet", "--batch-size", 4]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    evaluate.evaluate(evaluate.parse_options())
    again = json.loads((folder / "val_metrics.json").read_text())
    for name in [f"val/{name}{size}" for name in ("perplexity", "cider", "self_r5") for size in ("", "@16")]:
        assert again[name] == pytest.approx(metrics[name], rel=1e-4), name
    assert "another picture's" in capsys.readouterr().out

    pictures = []
    for i, row in enumerate(pyarrow.parquet.read_table(decoding_config.parent / "val.parquet").to_pylist()[:2]):
        pictures.append(decoding_config.parent / f"{i}.png")
        pictures[-1].write_bytes(row["image_bytes"])
    (decoding_config.parent / "bad.png").write_bytes(b"no picture")
    said = [item.description for item in load_descriptions(folder)]
    command = ["caption", folder / "model", *pictures]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    assert caption.caption(caption.parse_options()) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: {' '.join(text.split())}" for path, text in zip(pictures, said, strict=False)
    ]
    command = ["caption", folder / "model", decoding_config.parent / "bad.png", pictures[1], "--truncate_dim", 16,
               "--num_candidates", 3]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    assert caption.caption(caption.parse_options()) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{pictures[1]}: ")
    assert captured.err.startswith(f"error: {decoding_config.parent}/bad.png: no readable picture: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--truncate_dim", "65"], "--truncate_dim: embeddings have 64 numbers, got 65"),
        (["--num_candidates", "0"], "--num_candidates: must be 1 or more, got 0"),
        (["--alignment", "nowhere"], "alignment 'nowhere' cannot be loaded"),
    ],
)
def test_caption_refuses_in_one_line(decoding_config: Path, options: list[str], message: str, monkeypatch):
    trainer = make_decoding_trainer(decoding_config)
    folder = decoding_config.parent / "model"
    trainer.model.save_bridge_only(folder)
    trainer.processing_class.save_pretrained(folder)
    monkeypatch.setattr(sys, "argv", ["caption", str(folder), "a.png", *options])
    with pytest.raises(ConfigError, match=re.escape(message)):
        caption.caption(caption.parse_options())
    with pytest.raises(ConfigError, match=r"no decoder: its config\.json tells of a model of type edgeglass"):
        load_decoder(str(decoding_config.parent / "alignment"))


def test_a_loaded_decoder_says_what_the_saved_one_did(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config, "dataset.prompt=Go on.")
    folder = decoding_config.parent / "model"
    trainer.model.save_bridge_only(folder)
    trainer.processing_class.save_pretrained(folder)
    model, processor = load_decoder(str(folder))
    assert processor.prompt == "Go on."
    inputs = processor(images=trainer.eval_dataset.pair(0)[0], text=processor.prompt)
    said = [m.eval().generate(**inputs, max_new_tokens=8, do_sample=False) for m in (model, trainer.model)]
    assert torch.equal(*said)


def test_the_nearest_text_is_the_one_whose_embedding_is(decoding_config: Path):
    trainer = make_decoding_trainer(decoding_config)
    alignment, processor = trainer.model.alignment.eval(), trainer.processing_class
    texts = ["red dot", "blue bar", "green moon"]
    embeds = embed_texts(alignment, processor, texts)
    for size in (None, 16):
        for i, text in enumerate(texts):
            assert nearest_text(alignment, processor, embeds[i : i + 1], texts, size) == text


def test_a_run_goes_on_with_its_own_settings_and_ends_alone(decoding_config: Path):
    assert decode(load_decoding_config(decoding_config), SignalListener()) == 0
    (decoding_config.parent / "run/final_metrics.json").unlink()
    described_otherwise = load_decoding_config(decoding_config, ["generation.num_beams=2"])
    assert decode(described_otherwise, SignalListener()) == 0  # which changes nothing that was trained
    longer = "trainer.epochs=3"
    for override, key in (
        ("optimization.lr=0.1", "optimization.lr was 0.01 and is 0.1"),
        ("decoding.num_prefix_tokens=3", "decoding.num_prefix_tokens was 4 and is 3"),
        ("dataset.prompt=What?", "dataset.prompt was 'Say.' and is 'What?'"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(key)):
            decode(load_decoding_config(decoding_config, [longer, override]), SignalListener())
    save_tiny_language_model(decoding_config.parent / "language", "llama")
    with pytest.raises(CheckpointError, match=r"weights of decoding\.language_model was"):
        decode(load_decoding_config(decoding_config, [longer]), SignalListener())


def test_two_ranks_say_what_one_does(decoding_config: Path):
    folder = decoding_config.parent
    options = ("trainer.max_steps=1", "trainer.eval_strategy=no", "trainer.save_strategy=no", "optimization.lr=1e-9")
    torchrun = (BIN / "torchrun", "--nproc_per_node", 2, "run_decoding.py", "--config", decoding_config)
    start(*torchrun, *options, f"trainer.output_dir={folder}/two")
    decode(load_decoding_config(decoding_config, [*options, f"trainer.output_dir={folder}/one"]), SignalListener())
    two, one = (final_metrics(folder / name) for name in ("two", "one"))
    for name, value in one.items():
        if name.startswith("val/"):
            assert two[name] == pytest.approx(value, rel=1e-5), name
    said = [[item.description for item in load_descriptions(folder / name)] for name in ("two", "one")]
    assert said[0] == said[1]


def test_a_signal_while_pictures_are_described_is_a_preemption(decoding_config: Path, monkeypatch):
    signals, describe = SignalListener(), Describer.describe

    def interrupted(self: Describer, *args, **options):
        signals.received = len(args) > 1 and args[1] == 16  # in the final evaluation
        return describe(self, *args, **options)

    config = load_decoding_config(decoding_config)
    monkeypatch.setattr(Describer, "describe", interrupted)
    assert decode(config, signals) == 75
    monkeypatch.setattr(Describer, "describe", describe)
    assert decode(config, SignalListener()) == 0
    assert "val/untrained_cider" in json.loads((decoding_config.parent / "run/final_metrics.json").read_text())


def test_descriptions_come_back_as_they_were_saved(tmp_path: Path):
    pixels = numpy.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), dtype=numpy.uint8)
    described = [Described(pixels[0], "What?", "a dot", "a $dot$\n"), Described(pixels[1], "Where?", "", "")]
    save_descriptions(described, tmp_path)
    for before, after in zip(described, load_descriptions(tmp_path), strict=True):
        assert numpy.array_equal(before.picture, after.picture)
        assert (before.question, before.answer, before.description) == (
            after.question,
            after.answer,
            after.description,
        )
