"""The code in the documents runs, and its paths and commands exist."""

import re
from pathlib import Path

import pytest

from modeling_edgeglass import (
    EdgeGlassDecodingProcessor,
    EdgeGlassForConditionalGeneration,
    EdgeGlassModel,
    EdgeGlassProcessor,
)
from tests.language_models import save_tiny_language_model

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks() -> list[str]:
    return [block for path in DOCUMENTS for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)]


@pytest.mark.parametrize("block", python_blocks())
def test_python_blocks_run(block: str, vision_dir: str, text_dir: str, tmp_path: Path, monkeypatch):
    """With tiny towers in the places of those that `make demo` prepares and trains."""
    monkeypatch.chdir(ROOT)
    model = EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir, projection_dim=256, mrl_dimensions=[128])
    model.save_pretrained(tmp_path)
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(tmp_path)
    if "demo_decoding" in block:
        save_bridge(tmp_path)
    for path, stand_in in (
        ("outputs/demo_decoding/model", tmp_path / "bridge"),
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


@pytest.mark.parametrize("path", DOCUMENTS)
def test_what_the_documents_link_to_exists(path: Path):
    text = path.read_text()
    links = re.findall(r"\]\((?!http|#)([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert all((path.parent / link).exists() for link in links)
