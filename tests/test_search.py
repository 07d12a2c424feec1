"""The search command finds a picture by itself and by words, and says in one line what it cannot do."""

import json
import logging
import os
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from tests.commands import start
from tests.conftest import COLORS, picture, write_pairs
from training import search
from training.batches import tokenize
from training.build import image_transforms, load_model
from training.errors import ConfigError, DataError
from training.index import EdgeGlassIndex
from training.index_files import Item
from training.pictures import open_pictures
from training.transforms import load_pixels


@pytest.fixture
def alignment(vision_dir: str, text_dir: str, tmp_path: Path) -> str:
    return save_alignment(tmp_path / "alignment", vision_dir, text_dir)


def save_alignment(path: Path, vision_dir: str, text_dir: str, seed: int = 0, dim: int = 64) -> str:
    """A tiny model with random weights, and its processor."""
    torch.manual_seed(seed)
    sizes = {"projection_dim": dim, "mrl_dimensions": [16]}
    EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir, **sizes).save_pretrained(path)
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures in two folders, and what is no picture."""
    for i, color in enumerate(COLORS):
        path = tmp_path / "pictures" / ("b" if i % 2 else "a") / f"{color}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(color))
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    (tmp_path / "pictures/.hidden.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: object) -> list[str]:
    """The lines that a command prints."""
    monkeypatch.setattr(sys, "argv", ["search", *map(str, command)])
    capsys.readouterr()
    options = search.parse_options()
    {"build": search.build, "find": search.find}[options.command](options)
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    return lambda *words: run(monkeypatch, capsys, *words)


def test_a_picture_of_a_folder_finds_itself_first(command, alignment: str, folder: Path, tmp_path: Path):
    index = tmp_path / "index"
    assert command("build", alignment, folder, index, "--batch-size", 3) == [f"{index}: 8 pictures"]
    for options in ((), ("--exact",), ("--truncate_dim", 8), ("--truncate_dim", 8, "--exact")):
        lines = command("find", index, folder / "b/green.png", "--top", 3, *options)
        assert lines[0] == "1.0000  b/green.png", options
        assert len(lines) == 3
        scores = [float(line.split("  ")[0]) for line in lines]
        assert scores == sorted(scores, reverse=True)


def test_a_sentence_finds_what_its_embedding_is_nearest_to(command, alignment: str, tmp_path: Path):
    parquet = write_pairs(tmp_path / "a.parquet", 12)
    command("build", alignment, parquet, tmp_path / "index", "--dtype", "float16")
    model, processor = load_model(alignment)
    transform = image_transforms(processor, is_training=False)
    rows = pyarrow.parquet.read_table(parquet).to_pylist()
    pixels = torch.stack([load_pixels(row["image_bytes"], transform, None) for row in rows])
    for size in (None, 16):
        with torch.no_grad():
            image_embeds = model.get_image_features(pixels, size)
            text_embeds = model.get_text_features(**tokenize(processor.tokenizer, ["a red dot"]), truncate_dim=size)
        cosines = (image_embeds @ text_embeds.T)[:, 0].tolist()
        options = () if size is None else ("--truncate_dim", size)
        lines = command("find", tmp_path / "index", "a red dot", "--top", 20, *options)
        found = {line.split("  ")[1]: float(line.split("  ")[0]) for line in lines}
        expected = {f"a.parquet:{row} (id-{row})": cosine for row, cosine in enumerate(cosines)}
        assert found == pytest.approx(expected, abs=1e-3)  # float16, and four digits
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_building_again_gives_the_same_bits(command, alignment: str, folder: Path, tmp_path: Path):
    for name in ("one", "other"):
        command("build", alignment, folder, tmp_path / name, "--batch-size", 3)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_items_are_what_the_sources_hold_in_order(alignment: str, folder: Path, tmp_path: Path):
    transform = image_transforms(load_model(alignment)[1], is_training=False)
    os.rename(os.fsencode(folder / "a/red.png"), os.fsencode(folder / "a") + b"/r\xff.png")
    names = [item.item.file for item in open_pictures(str(folder), transform)]
    assert names == ["a/black.png", "a/blue.png", "a/purple.png", "a/r\\xff.png",
                     "b/green.png", "b/orange.png", "b/white.png", "b/yellow.png"]  # fmt: skip
    for number in range(2):
        write_pairs(tmp_path / f"shard-{number}.parquet", 3, first=3 * number)
    shards = open_pictures(f"{tmp_path}/shard-*.parquet", transform)
    captions = ("red", "green", "blue", "yellow", "purple", "orange")
    assert [shards[i].item for i in range(6)] == [
        Item(f"shard-{i // 3}.parquet", i % 3, f"id-{i}", f"{caption} dot number {i}")
        for i, caption in enumerate(captions)
    ]


def test_what_cannot_be_read_is_told_once_and_left_out(command, alignment: str, folder: Path, tmp_path: Path, caplog):
    (folder / "a/bad\x1b.png").write_bytes(b"no picture")
    os.mkfifo(folder / "a/pipe.png")
    build = ("build", alignment, folder, tmp_path / "index", "--batch-size", 3)
    with pytest.raises(DataError, match=r"1 of 10 pictures cannot be read, the last is a/bad\\x1b\.png; --max-bad-fr"):
        command(*build)
    assert not list(tmp_path.glob("index*"))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        lines = command(*build, "--max-bad-fraction", 0.2)
    assert lines == [f"{tmp_path / 'index'}: 8 pictures, 2 skipped, see above"]
    told = [record.getMessage() for record in caplog.records if record.name == "training.search"]
    assert told == ["a/bad\\x1b.png: no readable picture: in no format that is read", "a/pipe.png: no file"]
    index = EdgeGlassIndex(tmp_path / "index")
    assert not any("bad" in item.file or "pipe" in item.file for item in index.items(range(len(index))))


def test_bad_rows_of_a_parquet_are_left_out_but_not_those_without_a_caption(
    command, alignment: str, tmp_path: Path, caplog
):
    rows = pyarrow.parquet.read_table(write_pairs(tmp_path / "a.parquet", 6)).to_pylist()
    rows[1]["image_bytes"], rows[2]["caption"] = b"no picture", ""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    command("build", alignment, tmp_path / "a.parquet", tmp_path / "index", "--max-bad-fraction", 0.5)
    items = EdgeGlassIndex(tmp_path / "index").items(range(5))
    assert [item.row for item in items] == [0, 2, 3, 4, 5]
    assert "a.parquet:1 (id-1)  green dot number 1: no readable picture" in caplog.text


def test_names_and_ids_are_printed_without_control_codes(command, alignment: str, tmp_path: Path):
    rows = pyarrow.parquet.read_table(write_pairs(tmp_path / "a.parquet", 3)).to_pylist()
    rows[0] |= {"sample_id": "\x1b[2J\n", "caption": "red\n\x1b[2J " + 99 * "long "}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    command("build", alignment, tmp_path / "a.parquet", tmp_path / "index")
    lines = command("find", tmp_path / "index", "red")
    assert len(lines) == 3
    (line,) = [line for line in lines if r"a.parquet:0 (\x1b[2J\n)  red \x1b[2J long long" in line]
    assert len(line) < 150


def test_an_index_knows_its_model(
    command, alignment: str, folder: Path, vision_dir: str, text_dir: str, tmp_path: Path
):
    command("build", alignment, folder, tmp_path / "index")
    metadata = json.loads((tmp_path / "index/index.json").read_text())
    assert metadata["model"] == alignment
    assert metadata["sizes"] == [64]
    save_alignment(tmp_path / "smaller", vision_dir, text_dir, dim=32)
    save_alignment(tmp_path / "other", vision_dir, text_dir, seed=1)
    find = ("find", tmp_path / "index", "red", "--model")
    with pytest.raises(
        ConfigError, match=r"smaller: makes embeddings of 32 numbers, those of .*index have 64; --model"
    ):
        command(*find, tmp_path / "smaller")
    with pytest.raises(ConfigError, match=r"other: its weights are not those that .*index was made with"):
        command(*find, tmp_path / "other")
    Path(alignment).rename(tmp_path / "moved")
    assert len(command(*find, tmp_path / "moved")) == 8
    with pytest.raises(
        ConfigError, match=r"alignment: there is no such directory.*the index names it, --model names another"
    ):
        command(*find[:-1])


@pytest.mark.parametrize(
    ("D", "mrl_dimensions", "sizes"),
    [
        (4096, [2048, 1024, 512, 256, 128], (128, 512, 4096)),
        (4096, [64, 32], (64, 4096)),
        (1024, [768, 384], (384, 1024)),
        (512, [128], (128, 512)),
        (64, [32, 16], (64,)),
        (4096, [], (4096,)),
    ],
)
def test_a_funnel_has_trained_sizes(D: int, mrl_dimensions: list[int], sizes: tuple[int, ...]):  # noqa: N803
    assert search.funnel_sizes(D, mrl_dimensions) == sizes


@pytest.mark.parametrize(
    ("query", "expected"),
    [("a horse", False), ("horse", False), ("horse.png", True), ("horse.PNG", True), ("a horse.png", False),
     ("x" * 5000, False), ("nul\0", False), (__file__, True)],
)  # fmt: skip
def test_a_query_is_a_picture_where_it_names_a_file(query: str, expected: bool):
    assert search.is_picture(query) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build", "MODEL", "PICTURES", "INDEX"), "index: is there already; remove it"),
        (("build", "nowhere", "PICTURES", "new"), "nowhere: no EdgeGlass model"),
        (("build", "MODEL", "nowhere", "new"), "nowhere: no such file"),
        (("build", "MODEL", "INDEX", "new"), "no picture in this folder"),
        (("build", "MODEL", "PICTURES", "new", "--batch-size", "0"), "--batch-size: must be 1 or more, got 0"),
        (("build", "MODEL", "PICTURES", "new", "--max-bad-fraction", "2"), r"must be in 0\.\.1, got 2"),
        (("find", "nowhere", "red"), "nowhere: no index, which has a file index.json; build makes one"),
        (("find", "INDEX", " "), "the query is empty"),
        (("find", "INDEX", "horse.png"), r"horse\.png: no file"),
        (("find", "INDEX", "PICTURES/notes.txt"), r"notes\.txt: no readable picture"),
        (("find", "INDEX", "red", "--top", "0"), "--top: must be 1 or more, got 0"),
        (("find", "INDEX", "red", "--truncate_dim", "65"), "--truncate_dim: embeddings have 64 numbers, got 65"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words, message: str, command, alignment: str, folder: Path, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    vectors = np.random.default_rng(0).standard_normal((5, 64))
    EdgeGlassIndex.build("index", [(vectors, [Item(f"{i}.png") for i in range(5)])], sizes=(64,), model=alignment)
    places = {"MODEL": alignment, "PICTURES": str(folder), "INDEX": "index"}
    # The weights of this index are nobody's.
    monkeypatch.setattr("training.identity.weights_checksum", lambda state: "")
    with pytest.raises((ConfigError, DataError), match=message):
        command(*(re.sub("MODEL|PICTURES|INDEX", lambda name: places[name[0]], word) for word in words))
    assert not Path("new").exists()


def test_the_command_ends_with_a_line_and_not_a_traceback(tmp_path: Path):
    done = start(sys.executable, "-m", "training.search", "find", tmp_path, "a horse", expect_success=False)
    assert done.stderr == f"error: {tmp_path}: no index, which has a file index.json; build makes one\n"
    assert done.returncode == 1
