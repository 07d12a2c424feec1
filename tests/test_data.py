import csv
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.conftest import picture, png, write_pairs
from tests.towers import tiny_tokenizer
from training.bad_samples import BadSample, BadSampleLog
from training.batches import EpochSampler, ImageTextCollator
from training.config import DatasetConfig
from training.data import (
    PixmoParquetImageTextDataset,
    build_image_datasets_from_parquet,
    cut_words,
    drop_caption,
)
from training.errors import DataError, OutputError, printable
from training.images import decode_image
from training.parquet import ParquetPairs
from training.randomness import keyed_rng
from training.transforms import get_image_transforms

TRAIN, EVAL = get_image_transforms(16), get_image_transforms(16, is_training=False)


def open_pairs(path, **options) -> PixmoParquetImageTextDataset:
    return PixmoParquetImageTextDataset(path, EVAL, **options)


def write_table(path: Path, columns: dict) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_an_item_is_the_row(tmp_path: Path):
    dataset = open_pairs(write_pairs(tmp_path / "a.parquet", 6))
    assert len(dataset) == 6
    item = dataset[4]
    assert item["text"] == "purple dot number 4"
    assert item["sample_id"] == "id-4"
    assert torch.equal(item["image"], EVAL(decode_image(picture(item["text"])), random.Random()))


@pytest.mark.parametrize("layout", ["image_bytes", "image", "jpg", "struct", "datasets"])
@pytest.mark.parametrize("caption_column", ["caption", "text", "txt"])
def test_columns_are_found_by_name(layout: str, caption_column: str, tmp_path: Path):
    captions = ["one", "two"]
    pictures = [picture(caption) for caption in captions]
    if layout == "datasets":
        images = [{"bytes": data, "path": None} for data in pictures]
        features = datasets.Features({"image": datasets.Image(), caption_column: datasets.Value("string")})
        table = datasets.Dataset.from_dict({"image": images, caption_column: captions}, features=features)
        table.to_parquet(tmp_path / "a.parquet")
    else:
        images = [{"bytes": data, "path": "x.png"} for data in pictures] if layout == "struct" else pictures
        column = "image" if layout == "struct" else layout
        write_table(tmp_path / "a.parquet", {column: images, caption_column: captions, "other": [1, 2]})
    item = open_pairs(tmp_path / "a.parquet")[1]
    assert item["text"] == "two"
    assert item["sample_id"] == "1"  # no such column: the row number
    assert torch.equal(item["image"], EVAL(decode_image(picture("two")), random.Random()))


def test_columns_can_be_named(tmp_path: Path):
    columns = {"photo": [picture("a")], "image": [picture("b")], "alt": ["words"], "caption": ["others"], "key": [17]}
    path = write_table(tmp_path / "a.parquet", columns)
    item = open_pairs(path, image_column="photo", caption_column="alt", sample_id_column="key")[0]
    assert (item["text"], item["sample_id"]) == ("words", "17")
    assert not torch.equal(item["image"], open_pairs(path)[0]["image"])


def test_a_path_may_be_one_file_a_list_or_a_glob(tmp_path: Path):
    first, second = write_pairs(tmp_path / "a-0.parquet", 3), write_pairs(tmp_path / "a-1.parquet", 2, first=3)
    expected = [f"id-{i}" for i in range(5)]
    for path in ([first, second], str(tmp_path / "a-*.parquet"), [str(first), str(tmp_path / "a-1*")]):
        dataset = open_pairs(path)
        assert [dataset[i]["sample_id"] for i in range(len(dataset))] == expected
    assert open_pairs(second)[0]["sample_id"] == "id-3"


def test_rows_are_memory_mapped(tmp_path: Path):
    dataset = open_pairs(write_pairs(tmp_path / "a.parquet", 4))
    assert all(os.path.exists(file["filename"]) for file in dataset.pairs.table.cache_files)
    assert len(dataset.pairs.table.cache_files) == 1


def test_opening_a_file_four_times_as_large_takes_no_more_memory(tmp_path: Path):
    script = (
        "import re, sys; from pathlib import Path; from training.parquet import ParquetPairs;"
        "ParquetPairs(sys.argv[1]); print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )

    def peak(num_rows: int) -> float:  # MB
        path, noise = tmp_path / f"{num_rows}.parquet", random.Random(0).randbytes(20_000)
        columns = {"image": [b"%d" % i + noise for i in range(num_rows)], "caption": [""] * num_rows}
        # In one row group, which alone is all of the file, of small pages.
        options = {"use_dictionary": False, "compression": "none", "write_batch_size": 16}
        pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
        assert pyarrow.parquet.read_metadata(path).num_row_groups == 1
        environment = os.environ | {"HF_HOME": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True, env=environment
        )
        return int(done.stdout) / 1000

    assert peak(12_000) < peak(3_000) + 100  # the files have 240 and 60 MB


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path):
    path = write_pairs(tmp_path / "a.parquet", 8)

    def views(seed: int, epoch: int, num_workers: int) -> list[torch.Tensor]:
        dataset = PixmoParquetImageTextDataset(path, TRAIN, text_dropout_prob=0.5, seed=seed)
        sampler = EpochSampler(8, 4, seed=seed)
        sampler.set_epoch(epoch)
        loader = DataLoader(
            dataset,
            batch_size=4,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=ImageTextCollator(tiny_tokenizer()),
        )
        return [batch[key] for batch in loader for key in ("pixel_values", "input_ids")]

    reference = views(0, 3, num_workers=0)
    for num_workers in (0, 2):
        again = views(0, 3, num_workers)
        assert all(torch.equal(a, b) for a, b in zip(again, reference, strict=True))
    assert not torch.equal(views(0, 4, 0)[0], reference[0])
    assert not torch.equal(views(1, 3, 0)[0], reference[0])
    dataset = PixmoParquetImageTextDataset(path, TRAIN)
    assert torch.equal(dataset[5]["image"], dataset[0, 5]["image"])
    assert not torch.equal(dataset[5]["image"], dataset[1, 5]["image"])


def test_captions_are_dropped_as_often_as_asked_and_others_every_epoch(tmp_path: Path):
    dataset = PixmoParquetImageTextDataset(write_pairs(tmp_path / "a.parquet", 20), EVAL, text_dropout_prob=0.3)
    dropped = [[dataset[epoch, index]["text"] == "" for index in range(20)] for epoch in range(20)]
    share = sum(map(sum, dropped)) / 400
    assert abs(share - 0.3) < 0.07  # three standard errors
    assert dropped[0] != dropped[1]
    assert drop_caption("a", 0.0, random.Random(0)) == "a"
    assert drop_caption("a", 1.0, random.Random(0)) == ""


def test_only_train_drops_captions_and_only_val_and_test_have_match_ids(tmp_path: Path):
    path = write_pairs(tmp_path / "a.parquet", 4)
    built = build_image_datasets_from_parquet(
        DatasetConfig(),
        train_parquet_path=path,
        val_parquet_path=path,
        test_parquet_path=path,
        train_transforms=TRAIN,
        val_transforms=EVAL,
        max_text_length=12,
        text_dropout_prob=1.0,
    )
    assert sorted(built) == ["test", "train", "val"]
    assert {built["train"][i]["text"] for i in range(4)} == {""}
    assert "image_id" not in built["train"][0]
    for split in ("val", "test"):
        assert "" not in {built[split][i]["text"] for i in range(4)}
        assert torch.equal(built[split][0]["image"], built[split][1, 0]["image"])


def test_match_ids_are_equal_where_content_is(tmp_path: Path):
    same, other = picture("same"), picture("other")
    columns = {"image": [same, same, other], "caption": ["a", "b", "a"]}
    dataset = open_pairs(write_table(tmp_path / "a.parquet", columns), for_evaluation=True)
    images, captions = ([dataset[i][key] for i in range(3)] for key in ("image_id", "caption_id"))
    assert (images[0] == images[1], images[0] == images[2]) == (True, False)
    assert (captions[0] == captions[1], captions[0] == captions[2]) == (False, True)


def test_every_epoch_is_another_order_of_whole_batches():
    sampler = EpochSampler(10, 4, seed=0)
    epochs = []
    for epoch in range(30):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(indices) == len(sampler) == 8
        assert {e for e, _ in indices} == {epoch}
        epochs.append([index for _, index in indices])
        assert len(set(epochs[-1])) == 8
    assert len(set(map(tuple, epochs))) == 30
    assert {index for epoch in epochs for index in epoch} == set(range(10))
    sampler.set_epoch(7)
    assert [index for _, index in sampler] == epochs[7]
    assert len(list(EpochSampler(3, 4, seed=0))) == 3  # less than a batch is taken whole


def test_equal_keys_give_equal_draws_and_other_keys_others():
    draws = {key: keyed_rng(*key).random() for key in [(0, 1, 2, "a"), (0, 1, 2, "b"), (0, 2, 1, "a"), (1, 1, 2, "a")]}
    assert len(set(draws.values())) == 4
    assert keyed_rng(0, 1, 2, "a").random() == draws[0, 1, 2, "a"]
    assert keyed_rng(0, 1, 2, "a").random() == 0.20476353303367356  # the same on every machine and version


@pytest.mark.parametrize("words", [1, 3, 5, 100])
def test_words_are_cut_and_nothing_before_them_changes(words: int):
    caption = "  two  spaces,\nfour\twords here"
    cut = cut_words(caption, words)
    assert caption.startswith(cut)
    assert cut.split() == caption.split()[:words]


def test_cutting_words_never_takes_a_token_that_fits(tmp_path: Path):
    tokenizer = tiny_tokenizer()
    caption = "a bb ccc " * 50
    for length in (5, 20, 60):
        options = {"truncation": True, "max_length": length}
        assert tokenizer(cut_words(caption, length), **options) == tokenizer(caption, **options)


def test_a_batch_is_padded_to_its_longest_caption_and_cut_to_the_tokenizers_length():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 9
    items = [
        {"image": torch.zeros(3, 2, 2), "text": text, "sample_id": text, "bad_samples": []}
        for text in ("ab", "", "abcdefghijklmn")
    ]
    batch = ImageTextCollator(tokenizer)(items)
    names = ["attention_mask", "bad_samples", "input_ids", "pixel_values", "sample_ids", "token_hashes"]
    assert sorted(batch) == names
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 2, 9]
    assert batch["pixel_values"].shape == (3, 3, 2, 2)
    assert ImageTextCollator(tokenizer)(items[:1])["input_ids"].shape == (1, 4)


def test_the_captions_of_a_batch_are_tokenised_in_one_call(monkeypatch: pytest.MonkeyPatch):
    tokenizer, calls = tiny_tokenizer(), []
    items = [{"image": torch.zeros(3, 2, 2), "text": text, "sample_id": text, "bad_samples": []} for text in "abc"]
    ImageTextCollator(lambda texts, **options: calls.append(texts) or tokenizer(texts, **options))(items)
    assert calls == [["a", "b", "c"]]


def test_bad_files_and_columns_are_one_line_that_names_them(tmp_path: Path):
    def error(path, **options) -> str:
        with pytest.raises(DataError) as caught:
            open_pairs(path, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    good = write_pairs(tmp_path / "good.parquet", 2)
    assert error(tmp_path / "none.parquet") == f"{tmp_path}/none.parquet: no such file; there are good.parquet"
    assert "nor any other parquet file beside it" in error("/none/*.parquet")
    assert "no parquet file given" in error([])
    (tmp_path / "text.parquet").write_text("hello")
    assert "text.parquet: is no parquet file" in error(tmp_path / "text.parquet")
    (tmp_path / "half.parquet").write_bytes(good.read_bytes()[:500])
    assert "half.parquet: is no parquet file" in error(tmp_path / "half.parquet")

    def columns(name: str, **columns) -> str:
        return error(write_table(tmp_path / name, columns))

    assert columns("a.parquet", a=[1], caption=["x"]) == (
        f"{tmp_path}/a.parquet: no image column (image_bytes, image, jpg); it has a, caption; "
        "dataset.image_column in the config, or --image-column in evaluation, names another"
    )
    assert "no caption column (caption, text, txt); it has image" in columns("b.parquet", image=[b"x"])
    assert "column 'image' holds" in columns("c.parquet", image=["file.jpg"], caption=["x"])
    assert "column 'caption' holds" in columns("d.parquet", image=[b"x"], caption=[3])
    empty = pyarrow.array([], pyarrow.binary()), pyarrow.array([], pyarrow.string())
    assert "e.parquet: no rows" in columns("e.parquet", image=empty[0], caption=empty[1])
    assert "no column 'photo'; it has image_bytes, caption, sample_id" in error(good, image_column="photo")


def test_a_set_of_one_pair_is_refused(tmp_path: Path):
    one, two = write_pairs(tmp_path / "one.parquet", 1), write_pairs(tmp_path / "two.parquet", 2)
    options = {"train_transforms": TRAIN, "val_transforms": EVAL, "max_text_length": 9, "text_dropout_prob": 0.0}
    for train, val, message in ((two, one, "one pair is no val set"), (one, two, "one pair is no train set")):
        with pytest.raises(DataError, match=message):
            build_image_datasets_from_parquet(
                DatasetConfig(), train_parquet_path=train, val_parquet_path=val, **options
            )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": b"not a picture", "caption": "x"}, "row 1 (sample_id bad): no readable picture: "),
        (
            {"image": png(Image.new("RGB", (50, 50)))[:-30], "caption": "x"},
            "row 1 (sample_id bad): no readable picture: ",
        ),
        ({"image": None, "caption": "x"}, "row 1 (sample_id bad): the picture is empty, or not embedded"),
        ({"image": picture("x"), "caption": None}, "row 1 (sample_id bad): the caption is empty"),
    ],
)
def test_a_bad_row_is_named(row: dict, message: str, tmp_path: Path):
    good = {"image": picture("good"), "caption": "good", "sample_id": "good"}
    rows = [good, row | {"sample_id": "bad"}]
    dataset = open_pairs(
        write_table(tmp_path / "a.parquet", {key: [r[key] for r in rows] for key in good}), on_bad_sample="raise"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        dataset[1]
    assert dataset[0]["text"] == "good"


def test_a_sample_id_spoils_neither_a_message_nor_the_list(tmp_path: Path):
    hostile = "a\nb\x1b[31m\r\u202e" + "c" * 200_000
    columns = {"image": [picture("x"), b"y"], "caption": ["x", "y"], "sample_id": ["good", hostile]}
    path = write_table(tmp_path / "a.parquet", columns)
    (bad,) = open_pairs(path)[1]["bad_samples"]
    assert bad.sample_id.startswith(r"a\nb\x1b[31m\r\u202ecc")
    assert len(bad.sample_id) == 80
    with pytest.raises(DataError) as caught:
        open_pairs(path, on_bad_sample="raise")[1]
    assert str(caught.value).isprintable()
    assert printable("id-3 ö 狐 'x'") == "id-3 ö 狐 'x'"


def test_a_row_that_a_full_disk_cut_off_is_written_again(tmp_path: Path):
    path, rows = tmp_path / "bad.csv", [BadSample("f", row, "x" * 60, "reason") for row in range(3)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"^bad\.csv could not be written to .* File too large") as caught:
            BadSampleLog(path, {}, 0.5).record(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert path.stat().st_size == 150
    BadSampleLog(path, {}, 0.5).record(rows)
    with path.open(newline="") as file:
        assert [row["row"] for row in csv.DictReader(file)] == ["0", "1", "2"]


@pytest.mark.parametrize("left", ["", "file,ro", "file,row,sample_id,reason\r\nf,1,a,b\r\nf,2,a"])
def test_half_a_line_of_a_kill_stops_no_restart(tmp_path: Path, left: str):
    path = tmp_path / "bad.csv"
    path.write_text(left, newline="")
    BadSampleLog(path, {}, 0.5).record([BadSample("f", row, "a", "b") for row in (1, 2)])
    assert path.read_text().splitlines() == ["file,row,sample_id,reason", "f,1,a,b", "f,2,a,b"]


def test_an_answer_comes_with_its_question(tmp_path: Path):
    table = {"image_bytes": [b"", b""], "question": ["What?", None], "answer": ["A dot.", "A box."]}
    pyarrow.parquet.write_table(pyarrow.table(table | {"caption": ["one", "two"]}), tmp_path / "a.parquet")
    pairs = ParquetPairs(tmp_path / "a.parquet", with_questions=True)
    assert [(pairs[i].question, pairs[i].caption) for i in range(2)] == [("What?", "A dot."), (None, "A box.")]
    assert pairs.without_image(0).question == "What?"
    plain = ParquetPairs(tmp_path / "a.parquet")
    assert [(plain[i].question, plain[i].caption) for i in range(2)] == [(None, "one"), (None, "two")]
    with pytest.raises(
        DataError, match=r"no column 'asked'; .*dataset\.question_column in the config, names another$"
    ):
        ParquetPairs(tmp_path / "a.parquet", with_questions=True, question_column="asked")
    numbers = pyarrow.table(table | {"question": [1, 2]})
    pyarrow.parquet.write_table(numbers, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="column 'question' holds int64, not text"):
        ParquetPairs(tmp_path / "b.parquet", with_questions=True)
