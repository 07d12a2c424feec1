"""The exported encoders: what onnxruntime gives is what torch gives, and what is written is whole."""

import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerFast, ResNetConfig

from modeling_edgeglass import EdgeGlassConfig, EdgeGlassModel, EdgeGlassProcessor
from tests.commands import ROOT, start
from tests.conftest import write_pairs
from tests.towers import IMAGE_SIZE, TINY, tiny_tokenizer
from training import export, onnx_encoders
from training.build import load_model
from training.errors import ConfigError, DataError, OutputError
from training.onnx_encoders import ImageGraph, export_graph, largest_difference, open_session, run_session
from training.retrieval import retrieval_metrics

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

MAX_LENGTH = 32  # tokens
SIZES = ("", "@8")  # of RECALL_SIZES in these tests


def options(output_dir: Path, **others) -> Namespace:
    return Namespace(**{"output_dir": output_dir, "truncate_dim": None, "output": None, "parquet": None} | others)


@pytest.fixture(scope="module")
def run_dir(vision_dir: str, text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: a ViT, and a BERT of whose last two layers statistics are taken; D = 64."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = EdgeGlassModel.from_vision_text_pretrained(
        vision_dir, text_dir, projection_dim=64, mrl_dimensions=[32, 16],
        text_pooling_type="statistics", text_feature_layers=[-1, -2],
    )  # fmt: skip
    randomise_pooling(model)
    model.save_pretrained(folder / "model")
    processor = EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir, max_text_length=MAX_LENGTH)
    processor.save_pretrained(folder / "model")
    dataset = {"train_parquet": "gone.parquet", "val_parquet": str(write_pairs(folder / "val.parquet", 40))}
    config = {"dataset": dataset, "trainer": {"output_dir": str(folder)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def exported(run_dir: Path) -> Path:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "RECALL_SIZES", (8,))
        export.export(options(run_dir))
    return run_dir / "onnx"


@pytest.fixture(scope="module")
def parts_of_run(run_dir: Path) -> tuple[EdgeGlassModel, EdgeGlassProcessor]:
    model, processor = load_model(str(run_dir / "model"))
    return model.eval(), processor


def randomise_pooling(model: EdgeGlassModel) -> None:
    """At its start a pooling weighs all tokens alike, and a wrong product of scores would not show."""
    for encoder in (model.vision_encoder, model.text_encoder):
        if hasattr(encoder.pooling, "score"):
            nn.init.normal_(encoder.pooling.score, std=0.1)


def tokens(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Texts of 1 to `length` tokens, padded on the right; the first is the longest."""
    lengths = length - torch.arange(batch_size) * 5 % length
    attention_mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    input_ids = torch.randint(4, 99, (batch_size, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def pixels(batch_size: int) -> torch.Tensor:
    return torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(batch_size))


@pytest.mark.parametrize("batch_size", [1, 5])
def test_onnxruntime_gives_what_torch_gives_for_any_batch_and_any_length(
    exported: Path, parts_of_run, batch_size: int
):
    model, _ = parts_of_run
    images = run_session(open_session(exported / "image_encoder.onnx"), {"pixel_values": pixels(batch_size)})
    torch.testing.assert_close(images, model.get_image_features(pixels(batch_size)), rtol=0, atol=1e-5)
    session = open_session(exported / "text_encoder.onnx")
    for length in (1, 3, 20, MAX_LENGTH, 64):  # 64 are the positions of the tower
        batch = tokens(batch_size, length)
        torch.testing.assert_close(run_session(session, batch), model.get_text_features(**batch), rtol=0, atol=1e-5)


def test_neither_padding_nor_other_texts_change_an_embedding(exported: Path):
    session, batch = open_session(exported / "text_encoder.onnx"), tokens(4, 20)
    together = run_session(session, batch)
    for i, length in enumerate(batch["attention_mask"].sum(dim=1)):
        alone = run_session(session, {name: ids[i : i + 1, :length] for name, ids in batch.items()})
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("pooling_type", "truncate_dim"), [("simple", 16), ("multihead", None)])
def test_feature_maps_are_pooled_as_in_torch_and_cut_before_they_are_normalised(
    pooling_type: str, truncate_dim: int | None, tmp_path: Path
):
    """onnxruntime 1.32 multiplies a transposed feature map and a vector along the wrong axis, if it is let."""
    torch.manual_seed(0)
    model = EdgeGlassModel(
        EdgeGlassConfig(
            vision_config=ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]).to_dict(),
            text_config={"model_type": "bert", **TINY, "vocab_size": 99},
            projection_dim=64,
            mrl_dimensions=[16],
            vision_pooling_type=pooling_type,
            vision_feature_layers=[-1, -2],
        )
    ).eval()
    randomise_pooling(model)
    export_graph(ImageGraph(model.vision_encoder, truncate_dim), {"pixel_values": pixels(3)}, tmp_path / "a.onnx")
    for batch_size in (1, 5):
        found = run_session(open_session(tmp_path / "a.onnx"), {"pixel_values": pixels(batch_size)})
        full = model.vision_encoder(pixels(batch_size))
        torch.testing.assert_close(found, F.normalize(full[:, :truncate_dim], dim=-1), rtol=0, atol=1e-5)
    rows = {weight.dims[0] for weight in onnx.load(tmp_path / "a.onnx").graph.initializer if weight.dims}
    assert (64 in rows) == (truncate_dim is None)  # nothing is kept of what is cut


def test_the_example_needs_no_torch_and_finds_the_cosines_of_the_model(exported: Path, parts_of_run, tmp_path: Path):
    model, processor = parts_of_run
    noise = np.random.default_rng(0).integers(0, 256, (5, 9, 4), dtype=np.uint8)  # not square, half transparent
    picture = Image.fromarray(noise).resize((90, 50), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6  # it lies on its side
    picture.save(tmp_path / "a.png", exif=exif)
    texts = ["a dog", "two very good dogs", "word " * 100]
    argv = ["onnx_without_torch.py", str(exported), str(tmp_path / "a.png"), *texts]
    done = start(
        sys.executable,
        "-c",
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(['torch', 'transformers', 'modeling_edgeglass', 'training'])\n"  # None: no such
        f"sys.argv = {argv}\nrunpy.run_path('examples/onnx_without_torch.py', run_name='__main__')",
    )
    found = [float(line.split()[0]) for line in done.stdout.splitlines()]
    text_embeds = model.get_text_features(**processor(text=texts))
    expected = model.get_image_features(**processor(images=str(tmp_path / "a.png"))) @ text_embeds.T
    torch.testing.assert_close(torch.tensor([found]), expected, rtol=0, atol=1e-4)
    turned = model.get_image_features(**processor(images=picture)) @ text_embeds.T
    assert (turned - expected).abs().max() > 1e-3  # what is compared depends on how the picture is prepared


def test_the_tokenizers_file_cuts_and_pads_as_the_processor_does(exported: Path, parts_of_run):
    from tokenizers import Tokenizer

    texts = ["a dog", "word " * 100, ""]
    expected = parts_of_run[1](text=texts)
    found = Tokenizer.from_file(str(exported / "tokenizer.json")).encode_batch(texts)
    assert [text.ids for text in found] == expected["input_ids"].tolist()
    assert [text.attention_mask for text in found] == expected["attention_mask"].tolist()
    assert len(found[0].ids) == MAX_LENGTH


def test_the_report_holds_the_recall_of_both_kinds_of_weights(exported: Path, parts_of_run, run_dir: Path):
    report = json.loads((exported / "export.json").read_text())
    assert report["bytes"] == {
        path.name: path.stat().st_size for path in exported.iterdir() if path.name != "export.json"
    }
    assert max(report["largest_difference_from_torch"].values()) < 1e-5
    recall = report["recall"]
    assert (recall["pairs"], recall["bad_rows"], report["recall_not_measured"]) == (40, 0, None)
    dataset, _ = export.find_pairs(options(run_dir), parts_of_run[1])
    batch = parts_of_run[1](text=[dataset[i]["text"] for i in range(40)])
    batch["pixel_values"] = torch.stack([dataset[i]["image"] for i in range(40)])
    for weights, suffix in (("float32", ""), ("int8", "_int8")):
        sessions = [open_session(exported / f"{tower}_encoder{suffix}.onnx") for tower in ("image", "text")]
        # One scale for the activations of a batch: int8 depends on what is beside a sample.
        parts = [{name: values[rows] for name, values in batch.items()} for rows in (slice(32), slice(32, 40))]
        longest = [int(part["attention_mask"].sum(dim=1).max()) for part in parts]
        for part, length in zip(parts, longest, strict=True):
            part |= {name: part[name][:, :length] for name in ("input_ids", "attention_mask")}
        embeds = [torch.cat([run_session(session, part) for part in parts]) for session in sessions]
        metrics = retrieval_metrics(*embeds, [8])
        assert recall[weights] == {name: metrics[name] for name in recall[weights]}
    for name, kept in recall["kept"].items():
        before, after = (
            recall[weights][f"i2t_{name}"] + recall[weights][f"t2i_{name}"] for weights in ("float32", "int8")
        )
        assert kept == pytest.approx(after / before)
    assert set(recall["kept"]) == {f"r{k}{size}" for k in (1, 10) for size in SIZES}


def test_int8_is_close_to_float32_and_smaller(exported: Path):
    batches = {"image": {"pixel_values": pixels(5)}, "text": tokens(5, 20)}
    for tower, batch in batches.items():
        paths = [exported / f"{tower}_encoder{suffix}.onnx" for suffix in ("", "_int8")]
        before, after = (run_session(open_session(path), batch) for path in paths)
        cosines = (before * after).sum(dim=1)
        assert 0.98 < cosines.min() < 1 - 1e-6
        assert paths[1].stat().st_size < paths[0].stat().st_size


def test_no_file_names_a_folder_of_the_machine_that_made_it(exported: Path, run_dir: Path):
    for path in exported.iterdir():
        content = path.read_bytes()
        for folder in (ROOT, run_dir, Path(torch.__file__).parents[1]):
            assert str(folder).encode() not in content, (path.name, folder)


def test_where_the_pairs_are_gone_the_report_says_so(exported: Path, parts_of_run, tmp_path: Path):
    processor = parts_of_run[1]
    dataset, reason = export.find_pairs(options(tmp_path), processor)
    assert dataset is None
    assert reason.startswith(f"{tmp_path} holds no config.yaml")
    gone = {"dataset": {"train_parquet": "a.parquet", "val_parquet": f"{tmp_path}/gone.parquet"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(gone | {"trainer": {"output_dir": "a"}}))
    dataset, reason = export.find_pairs(options(tmp_path), processor)
    assert dataset is None
    assert "gone.parquet" in reason
    report = json.loads((exported / "export.json").read_text()) | {"recall": None, "recall_not_measured": reason}
    assert f"recall of int8 was not measured: {reason}; --parquet FILE measures it" in export.describe(report)
    with pytest.raises(DataError, match=r"gone\.parquet"):
        export.find_pairs(options(tmp_path, parquet=f"{tmp_path}/gone.parquet"), processor)


def test_the_table_has_a_row_per_size_and_kind_of_weights():
    def shares(first: float) -> dict[str, float]:
        names = [f"{way}_r{k}{size}" for size in ("", "@512") for k in (1, 10) for way in ("i2t", "t2i")]
        return {name: first + 0.01 * i for i, name in enumerate(names)}

    kept = {"r1": 0.5, "r10": None, "r1@512": 1.0, "r10@512": 1.25}
    recall = {"pairs": 7, "float32": shares(0.1), "int8": shares(0.2), "kept": kept}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "RECALL_SIZES", (512,))
        rows = [re.findall(r"[\d.a-z-]+", line) for line in export.recall_table(recall, 1024).splitlines()[3:]]
    assert rows == [
        ["1024", "float32", "10.0", "12.0", "11.0", "13.0"],
        ["1024", "int8", "20.0", "22.0", "21.0", "23.0", "50.0", "-"],
        ["512", "float32", "14.0", "16.0", "15.0", "17.0"],
        ["512", "int8", "24.0", "26.0", "25.0", "27.0", "100.0", "125.0"],
    ]


def test_an_export_that_fails_leaves_the_earlier_one_as_it_was(tmp_path: Path):
    def write(content: str, error: BaseException | None = None) -> None:
        with export.written_aside(tmp_path / "onnx") as folder:
            (folder / "export.json").write_text(content)
            if error:
                raise error

    write("old")
    write("new")
    for error in (KeyError(), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            write("half", error)
        assert [path.name for path in tmp_path.iterdir()] == ["onnx"]
        assert (tmp_path / "onnx/export.json").read_text() == "new"
    with pytest.raises(OutputError, match="onnx could not be written"):
        write("half", OSError("No space left on device"))


def test_what_is_no_export_is_not_replaced(tmp_path: Path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(ConfigError, match="thesis: is there and no export, so that it is not replaced"), \
            export.written_aside(tmp_path / "thesis"):  # fmt: skip
        pass
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file/onnx: cannot be written"),
        export.written_aside(tmp_path / "file/onnx"),
    ):
        pass


@pytest.mark.parametrize("truncate_dim", [0, 65])
def test_a_size_that_is_none_is_refused(run_dir: Path, truncate_dim: int):
    with pytest.raises(ConfigError, match=rf"--truncate_dim: must be in 1\.\.64, got {truncate_dim}"):
        export.export(options(run_dir, truncate_dim=truncate_dim))


def test_a_folder_without_an_alignment_is_refused(vision_dir: str, tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere: is no directory"):
        export.export(options(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="no EdgeGlass model"):
        export.export(options(tmp_path))
    with pytest.raises(ConfigError, match=r"its config\.json tells of a model of type vit"):
        export.export(options(Path(vision_dir)))


def test_missing_packages_are_named_in_one_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "NEEDED", ("onnx", "no_such_one", "nor_this"))
    monkeypatch.setattr(sys, "argv", ["export", str(run_dir), "--onnx"])
    with pytest.raises(SystemExit) as ended:
        export.main()
    assert ended.value.code == "error: an export wants no_such_one and nor_this: pip install no_such_one nor_this"


def test_a_tower_that_cannot_be_exported_is_named(model: EdgeGlassModel, tmp_path: Path, monkeypatch):
    def depends_on_values(**inputs):
        raise RuntimeError("no graph of this" if torch.compiler.is_exporting() else "")

    monkeypatch.setattr(model.vision_encoder.backbone, "forward", depends_on_values)
    with pytest.raises(ConfigError, match=r"^vision tower ViTModel cannot be exported to ONNX: .+$"):
        export_graph(ImageGraph(model.eval().vision_encoder, None), {"pixel_values": pixels(3)}, tmp_path / "a.onnx")
    assert list(tmp_path.glob("*.onnx*")) == []


def test_a_file_that_differs_from_torch_is_an_error(exported: Path, parts_of_run, model: EdgeGlassModel, monkeypatch):
    batches = [{"pixel_values": pixels(2)}]
    with pytest.raises(ConfigError, match=r"vision tower ViTModel: its ONNX file gives other embeddings than torch"):
        largest_difference(
            ImageGraph(model.eval().vision_encoder, None), exported / "image_encoder.onnx", batches
        )  # another model
    monkeypatch.setattr(onnx_encoders, "run_session", lambda session, batch: torch.full((2, 64), float("nan")))
    with pytest.raises(ConfigError, match="by up to nan"):
        largest_difference(ImageGraph(parts_of_run[0].vision_encoder, None), exported / "image_encoder.onnx", batches)


def test_a_file_that_onnxruntime_cannot_run_is_an_error(model: EdgeGlassModel, tmp_path: Path):
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    value = [helper.make_tensor_value_info(name, floats, [1]) for name in ("pixel_values", "image_embeds")]
    node = helper.make_node("Unheard", ["pixel_values"], ["image_embeds"], domain="nowhere")
    graph = helper.make_graph([node], "graph", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("nowhere", 1)]), tmp_path / "a.onnx")
    with pytest.raises(ConfigError, match=r"^vision tower ViTModel: onnxruntime cannot run its ONNX file: .*Unheard"):
        largest_difference(ImageGraph(model.vision_encoder, None), tmp_path / "a.onnx", [])


def test_a_tokenizer_that_does_more_than_its_file_is_refused(tmp_path: Path):
    class Shouting(PreTrainedTokenizerFast):
        def __call__(self, texts, **options):
            return super().__call__([f"{text}!" for text in texts], **options)

    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 9
    export.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    tokenizer.__class__ = Shouting
    with pytest.raises(ConfigError, match="Shouting does more than its file tells"):
        export.save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
