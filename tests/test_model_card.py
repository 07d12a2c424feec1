"""Facts of a model card that need no run."""

from pathlib import Path

import pytest

from training.model_card import alignment_parts


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license: other\nlicense_name: llama3", "llama3"),
        ("license: [", "not stated where it came from"),
        (b"\xff", "not stated where it came from"),
    ],
)
def test_a_towers_card_says_its_licence(card: str | bytes, licence: str, tmp_path: Path):
    (tmp_path / "README.md").write_bytes(card if isinstance(card, bytes) else f"---\n{card}\n---\n".encode())
    side = {"model_type": "vit"}
    config = {
        f"{name}_{key}": value
        for name in ("vision", "text")
        for key, value in {"name_or_path": str(tmp_path), "revision": None, "config": side, "freeze": True}.items()
    }
    assert {part.licence for part in alignment_parts(config, ask_hub=True)} == {licence}
