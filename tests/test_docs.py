"""The code in the documents runs, and its paths and commands exist."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from modeling_edgeglass import (
    EdgeGlassDecodingProcessor,
    EdgeGlassForConditionalGeneration,
    EdgeGlassModel,
    EdgeGlassProcessor,
)
from tests.conftest import picture
from tests.language_models import save_tiny_language_model
from training.build import save_alignment
from training.export import export
from training.index import EdgeGlassIndex
from training.index_files import Item

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks() -> list[str]:
    return [block for path in DOCUMENTS for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)]


@pytest.mark.parametrize("block", python_blocks())
def test_python_blocks_run(block: str, vision_dir: str, text_dir: str, tmp_path: Path, monkeypatch):
    """With tiny towers in the places of those that `make demo` prepares and trains."""
    monkeypatch.chdir(ROOT)
    model = EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir, projection_dim=256, mrl_dimensions=[128])
    save_alignment(model, tmp_path)
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(tmp_path)
    (tmp_path / "picture.png").write_bytes(picture("a horse"))
    if "demo_decoding" in block:
        save_bridge(tmp_path)
    if "demo/onnx" in block:
        export(Namespace(output_dir=tmp_path, truncate_dim=None, output=None, parquet=None))
    if "emoji_index" in block:
        pictures = [(torch.randn(6, 256).numpy(), [Item(f"{i}.png") for i in range(6)])]
        EdgeGlassIndex.build(tmp_path / "index", pictures, sizes=(128, 256))
    for path, stand_in in (
        ("outputs/demo_decoding/model", tmp_path / "bridge"),
        ("outputs/demo/onnx", tmp_path / "onnx"),
        ("outputs/emoji_index", tmp_path / "index"),
        ("picture.png", tmp_path / "picture.png"),
        ("outputs/demo/model", tmp_path),
        ("examples/towers/efficientnet-lite0", vision_dir),
        ("examples/towers/all-minilm-l6-v2", text_dir),
    ):
        block = block.replace(path, str(stand_in))
    exec(compile(block, "document", "exec"), {})


def save_bridge(folder: Path) -> None:
    """From the alignment in a folder to a tiny language model."""
    ends = str(folder), save_tiny_language_model(folder / "language")
    EdgeGlassForConditionalGeneration.from_alignment_pretrained(*ends).save_bridge_only(folder / "bridge")
    EdgeGlassDecodingProcessor.from_alignment_pretrained(*ends).save_pretrained(folder / "bridge")


def test_each_of_the_five_ways_to_load_takes_six_lines():
    section = (ROOT / "README.md").read_text().split("## Five ways to load")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert [len(list(filter(None, block.split("\n")))) for block in blocks] == [6] * 5


@pytest.mark.parametrize("path", DOCUMENTS)
def test_what_the_documents_link_to_exists(path: Path):
    text = path.read_text()
    links = re.findall(r"\]\((?!http|#)([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert all((path.parent / link).exists() for link in links)
