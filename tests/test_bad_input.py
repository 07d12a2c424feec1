"""Strangers' files: either they load, or one line says which file, column or row is wrong."""

import csv
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from tests.conftest import picture, png, write_pairs
from tests.runs import make_trainer
from tests.towers import tiny_tokenizer
from training.bad_samples import BadSample, BadSampleLog
from training.batches import ImageTextCollator
from training.data import PixmoParquetImageTextDataset
from training.errors import DataError
from training.images import UndecodableImageError, decode_image
from training.transforms import get_image_transforms

TRAIN, EVAL = get_image_transforms(16), get_image_transforms(16, is_training=False)


def write_table(path: Path, columns: dict, **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def write_mixed(path: Path, num_rows: int, bad: dict[int, dict]) -> Path:
    """Good pairs with some columns of some rows replaced."""
    rows = [{"image": picture(f"{i}"), "caption": f"caption {i}", "sample_id": f"id-{i}"} for i in range(num_rows)]
    for index, change in bad.items():
        rows[index] |= change
    return write_table(path, {key: [row[key] for row in rows] for key in rows[0]})


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be of that size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


BAD_ROWS = {
    "truncated": {"image": picture("x", 200)[:-100]},
    "no picture": {"image": b"hello"},
    "empty bytes": {"image": b""},
    "null picture": {"image": None},
    "bomb": {"image": png_header(60_000, 60_000)},
    "zero wide": {"image": png_header(0, 10)},
    "null caption": {"caption": None},
    "empty caption": {"caption": " \n"},
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_replaced_by_another_the_same_after_a_restart(kind: str, tmp_path: Path):
    path = write_mixed(tmp_path / "a.parquet", 8, {3: BAD_ROWS[kind]})

    def item(epoch: int) -> dict:
        return PixmoParquetImageTextDataset(path, TRAIN)[epoch, 3]

    first = item(0)
    assert first["sample_id"] != "id-3"
    assert torch.equal(
        first["image"], PixmoParquetImageTextDataset(path, TRAIN)[0, int(first["sample_id"][3:])]["image"]
    )
    assert [(bad.file, bad.row, bad.sample_id) for bad in first["bad_samples"]] == [(str(path), 3, "id-3")]
    assert all(torch.equal(first["image"], item(0)["image"]) for _ in range(3))
    assert len({item(epoch)["sample_id"] for epoch in range(20)}) > 3


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_can_raise_and_is_named(kind: str, tmp_path: Path):
    path = write_mixed(tmp_path / "a.parquet", 8, {3: BAD_ROWS[kind]})
    with pytest.raises(DataError, match=r"a\.parquet: row 3 \(sample_id id-3\): "):
        PixmoParquetImageTextDataset(path, TRAIN, on_bad_sample="raise")[3]


def test_rows_are_numbered_within_their_file(tmp_path: Path):
    first, second = (
        write_pairs(tmp_path / "a.parquet", 3),
        write_mixed(tmp_path / "b.parquet", 4, {2: {"image": b"x"}}),
    )
    pyarrow.parquet.write_table(
        pyarrow.parquet.read_table(first).rename_columns(["image", "caption", "sample_id"]), first
    )
    bad = PixmoParquetImageTextDataset([first, second], TRAIN)[5]["bad_samples"][0]
    assert (bad.file, bad.row) == (str(second), 2)


def test_nothing_but_bad_rows_is_an_error_and_no_endless_search(tmp_path: Path):
    path = write_mixed(tmp_path / "a.parquet", 3, {i: {"image": b"x"} for i in range(3)})
    with pytest.raises(DataError, match="rows in a row are bad"):
        PixmoParquetImageTextDataset(path, TRAIN)[0]


def test_training_goes_on_and_writes_every_bad_row_down_once(run_config: Path):
    bad = {3: BAD_ROWS["truncated"] | {"sample_id": "../../x"}, 7: BAD_ROWS["null caption"]}
    write_mixed(run_config.parent / "train.parquet", 40, bad)
    for epochs in (2, 4):  # a resumed session writes nothing twice
        trainer = make_trainer(run_config, f"trainer.epochs={epochs}", "trainer.dataloader_num_workers=2")
        from training.checkpoints import newest_checkpoint

        trainer.train(resume_from_checkpoint=newest_checkpoint(trainer.args.output_dir))
        assert trainer.state.global_step == 10 * epochs
    with (run_config.parent / "run" / "bad_samples.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["row"], row["sample_id"]) for row in rows) == [("3", "../../x"), ("7", "id-7")]
    assert {row["reason"].split(":")[0] for row in rows} == {"no readable picture", "the caption is empty"}


def test_too_many_bad_rows_stop_the_run(run_config: Path):
    write_mixed(run_config.parent / "train.parquet", 20, {i: {"image": b"x"} for i in (2, 5)})
    with pytest.raises(
        DataError, match=r"train\.parquet: 2 of 20 rows are bad, more than dataset\.max_bad_fraction 0\.05"
    ):
        make_trainer(run_config).train()
    make_trainer(run_config, "dataset.max_bad_fraction=0.1", f"trainer.output_dir={run_config.parent}/other").train()


def test_evaluation_leaves_bad_rows_out_and_counts_them(run_config: Path):
    overrides = ["dataset.max_bad_fraction=0.5", "dataset.image_column=image"]
    train = write_mixed(run_config.parent / "train.parquet", 20, {})
    good = [i for i in range(10) if i not in (3, 7)]
    write_mixed(run_config.parent / "val.parquet", 10, {3: BAD_ROWS["truncated"], 7: BAD_ROWS["empty caption"]})
    with_bad = make_trainer(run_config, *overrides).evaluate()
    table = pyarrow.parquet.read_table(run_config.parent / "val.parquet").take(good)
    pyarrow.parquet.write_table(table, run_config.parent / "val.parquet")
    without = make_trainer(run_config, *overrides).evaluate()
    assert (with_bad["eval_bad_rows"], without["eval_bad_rows"]) == (2, 0)
    for name, value in without.items():
        if not name.endswith(("rows", "runtime", "per_second", "time")):
            assert with_bad[name] == pytest.approx(value, rel=1e-5), name
    assert train.exists()


def test_the_log_is_shared_between_ranks(tmp_path: Path):
    logs = [BadSampleLog(tmp_path / "bad.csv", {"f": 100}, 0.5) for _ in range(2)]
    for log in logs:
        log.record([BadSample("f", 1, 'a,"b"\n\0', "reason"), BadSample("f", 2, "c", "reason")])
        log.record([BadSample("f", 2, "c", "reason")])
    logs[0].record([BadSample("f", 3, "d", "reason")])
    with (tmp_path / "bad.csv").open(newline="") as file:
        assert [row["row"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_a_huge_picture_is_refused_before_it_is_unpacked():
    with pytest.raises(UndecodableImageError, match="12000 x 12000 pixels, where 40000000 are the limit"):
        decode_image(png_header(12_000, 12_000))
    with pytest.raises(UndecodableImageError, match="decompression bomb"):  # Pillow's own limit comes first
        decode_image(png_header(60_000, 60_000))
    assert decode_image(png(Image.new("RGB", (30, 20))), max_pixels=600).size == (30, 20)
    with pytest.raises(UndecodableImageError, match="30 x 20 pixels, where 599 are the limit"):
        decode_image(png(Image.new("RGB", (30, 20))), max_pixels=599)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damage_of_any_kind_is_a_picture_or_a_clear_error(format: str):
    rng = random.Random(0)
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=format)
    data = buffer.getvalue()
    for _ in range(60):
        damaged = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.5 else data)
        for _ in range(rng.randrange(1, 20)):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            mode, reason = decode_image(bytes(damaged)).mode, "-"
        except UndecodableImageError as error:
            mode, reason = "RGB", str(error)
        assert mode == "RGB"
        assert len(reason.splitlines()) == 1


@pytest.mark.parametrize("caption", ["a\0b", "🦊🌍 fox", "שלום عالم", "x" * 100_000, "word " * 30_000])
def test_strange_captions_work(caption: str, tmp_path: Path):
    path = write_mixed(tmp_path / "a.parquet", 2, {1: {"caption": caption}})
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 32
    dataset = PixmoParquetImageTextDataset(path, EVAL, max_text_length=32)
    batch = ImageTextCollator(tokenizer)([dataset[0], dataset[1]])
    assert batch["input_ids"].shape[1] <= 32
    assert not batch["bad_samples"]


def column_forms() -> dict[str, dict]:
    images, captions = [picture("a"), picture("b")], ["first", "second"]
    lists = pyarrow.array([list(data) for data in images], pyarrow.list_(pyarrow.uint8()))

    def typed(image_type: pyarrow.DataType, caption_type: pyarrow.DataType) -> dict:
        return {"image": pyarrow.array(images, image_type), "caption": pyarrow.array(captions, caption_type)}

    return {
        "large": typed(pyarrow.large_binary(), pyarrow.large_string()),
        "view": typed(pyarrow.binary_view(), pyarrow.string_view()),
        "dictionary": {"image": images, "caption": pyarrow.array(captions).dictionary_encode()},
        "list<uint8>": {"image": lists, "caption": captions},
        "img2dataset": {"jpg": images, "txt": captions, "key": ["000", "001"]},
    }


@pytest.mark.parametrize("form", column_forms())
def test_every_form_of_a_column_loads(form: str, tmp_path: Path):
    dataset = PixmoParquetImageTextDataset(write_table(tmp_path / "a.parquet", column_forms()[form]), EVAL)
    item = dataset[1]
    assert item["text"] == "second"
    assert torch.equal(item["image"], EVAL(decode_image(picture("b")), random.Random()))
    assert item["sample_id"] == ("001" if form == "img2dataset" else "1")


def test_shards_must_have_the_same_columns_and_may_be_empty(tmp_path: Path):
    images, captions = [picture("a"), picture("b")], ["first", "second"]
    first = write_table(tmp_path / "a.parquet", {"image": images, "caption": captions})
    empty = write_table(
        tmp_path / "b.parquet",
        {"image": pyarrow.array([], pyarrow.binary()), "caption": pyarrow.array([], pyarrow.string())},
    )
    assert len(PixmoParquetImageTextDataset([first, empty], EVAL)) == 2
    lacking = write_table(tmp_path / "c.parquet", {"image": images, "text": captions})
    with pytest.raises(DataError, match=r"c\.parquet: no column 'caption'; it has image, text"):
        PixmoParquetImageTextDataset([first, lacking], EVAL)
    wrong = write_table(tmp_path / "d.parquet", {"image": images, "caption": [1, 2]})
    with pytest.raises(DataError, match=r"d\.parquet: column 'caption' holds int64, not text"):
        PixmoParquetImageTextDataset([first, wrong], EVAL)


def test_a_damaged_page_is_found_and_its_file_named(tmp_path: Path):
    good = write_pairs(tmp_path / "a.parquet", 8)
    damaged = write_pairs(tmp_path / "b.parquet", 8, first=8)
    content = bytearray(damaged.read_bytes())
    content[40:80] = bytes(40)
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=r"b\.parquet: is damaged: ") as caught:
        PixmoParquetImageTextDataset([good, damaged], EVAL)
    assert "\n" not in str(caught.value)


def test_a_collapsed_model_is_warned_of(run_config: Path, caplog):
    trainer = make_trainer(run_config)
    trainer.evaluate()
    caplog.clear()
    torch.nn.init.constant_(trainer._model.text_encoder.projection.bias, 1000.0)
    trainer.evaluate()
    assert "collapsed: all text embeddings are alike (mean cosine 1.0" in caplog.text


def not_utf8(bad: bytes) -> pyarrow.Array:
    """Four texts of which the third is `bad`, which pyarrow itself would not write."""
    content = pyarrow.array([b"a", b"b", bad, b"d"], pyarrow.binary())
    return pyarrow.Array.from_buffers(pyarrow.string(), 4, content.buffers())


BAD_CELLS = {
    "caption": ({"caption": not_utf8(b"\xff\xfe")}, "the caption or id is no UTF-8"),
    "sample_id": ({"sample_id": not_utf8(b"\xff\xfe")}, "the caption or id is no UTF-8"),
    "picture": (
        {
            "image": pyarrow.array(
                [[1, None] if i == 2 else list(picture(str(i))) for i in range(4)], pyarrow.list_(pyarrow.uint8())
            )
        },
        "a byte of the picture is null",
    ),
}


@pytest.mark.parametrize("cell", BAD_CELLS)
def test_a_cell_that_cannot_be_read_makes_its_row_a_bad_one(cell: str, tmp_path: Path):
    columns, reason = BAD_CELLS[cell]
    good = {"image": [picture(str(i)) for i in range(4)], "caption": list("abcd"), "sample_id": list("abcd")}
    dataset = PixmoParquetImageTextDataset(write_table(tmp_path / "a.parquet", good | columns), EVAL)
    (bad,) = dataset[2]["bad_samples"]
    assert (bad.row, bad.sample_id, bad.reason) == (2, "2", reason)
    assert not dataset[1]["bad_samples"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [{"bytes": b"x", "path": None}]}, "column 'image' holds struct<.*>, where .*a.parquet has binary"),
        ({"sample_id": ["x"]}, "column 'sample_id' holds string, where .*a.parquet has int64"),
        ({"sample_id": [1.5]}, "column 'sample_id' holds double, where .*a.parquet has int64"),
    ],
)
def test_a_column_is_of_one_kind_in_all_shards(columns: dict, message: str, tmp_path: Path):
    good = {"image": [b"x"], "caption": ["x"], "sample_id": [1]}
    first = write_table(tmp_path / "a.parquet", good)
    with pytest.raises(DataError, match=rf"b\.parquet: {message}"):
        PixmoParquetImageTextDataset([first, write_table(tmp_path / "b.parquet", good | columns)], EVAL)
    other = pyarrow.array([2], pyarrow.uint8()), pyarrow.array(["y"]).dictionary_encode()
    alike = write_table(tmp_path / "c.parquet", good | {"sample_id": other[0], "caption": other[1]})
    dataset = PixmoParquetImageTextDataset([first, alike], EVAL)
    assert [dataset.pairs[i].sample_id for i in (0, 1)] == ["1", "2"]


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    arrays = [pyarrow.array([picture("x")]), pyarrow.array(["x"]), pyarrow.array(["y"])]
    table = pyarrow.Table.from_arrays(arrays, names=["image", "caption", "caption"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: several columns are called 'caption'"):
        PixmoParquetImageTextDataset(tmp_path / "a.parquet", EVAL)


def test_a_file_may_be_called_like_a_glob(tmp_path: Path):
    path = write_pairs(tmp_path / "data[1]*.parquet", 3)
    write_pairs(tmp_path / "data1.parquet", 5)
    dataset = PixmoParquetImageTextDataset(path, EVAL)
    assert [dataset[i]["sample_id"] for i in range(len(dataset))] == ["id-0", "id-1", "id-2"]


@pytest.mark.parametrize(
    "claimed",
    ["{", '{"info": {"features": {"image": {"_type": "Nope"}}}}', '{"info": {"features": {"x": {"_type": "Audio"}}}}'],
)
def test_what_a_file_claims_about_its_features_is_not_believed(claimed: str, tmp_path: Path):
    table = pyarrow.table({"image": [picture("x")], "caption": ["words"]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": claimed}), tmp_path / "a.parquet")
    assert PixmoParquetImageTextDataset(tmp_path / "a.parquet", EVAL)[0]["text"] == "words"
