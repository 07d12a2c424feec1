from pathlib import Path

import pytest

from training.errors import ConfigError
from training.privacy import check_private, public_command, public_name, public_settings


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("/home/me/towers/vit", "vit"),
        ("/home/me/my towers/vit/", "vit"),
        ("~/vit", "vit"),
        ("./vit", "vit"),
        ("../towers/vit", "vit"),
        ("examples/towers/vit", "vit"),
        (r"C:\data\vit", "vit"),
        ("data/train-*.parquet", "train-*.parquet"),
        ("tests/towers.py", "towers.py"),  # a file that is there
        ("file:///mnt/me/train.parquet", "train.parquet"),
        ("https://me:secret@host/train.parquet", "https://host/train.parquet"),
        ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14"),
        ("BAAI/bge-small-en-v1.5", "BAAI/bge-small-en-v1.5"),
        ("hf://datasets/me/pairs/train.parquet", "hf://datasets/me/pairs/train.parquet"),
        ("gelu", "gelu"),
        (r"model\.layers\.\d+\.q_proj", r"model\.layers\.\d+\.q_proj"),
        (".*q_proj", ".*q_proj"),
        ("", ""),
    ],
)
def test_names_lose_their_place_and_nothing_else(name: str, public: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    assert public_name(name) == public
    assert public_name(public) == public


def test_settings_lose_their_places_and_nothing_else():
    settings = {
        "train_parquet": ["data/x/a.parquet", "b.parquet"],
        "tower": {"model_name": "me/tower", "lr": 0.5, "freeze": True, "revision": None},
        "prompt": "Is it a dog and/or a cat? yes/no?",
        "short": "/no_think Say.",
        "anywhere": "/mnt/me/x.bin",
    }
    changed = {"train_parquet": ["a.parquet", "b.parquet"], "anywhere": "x.bin"}
    assert public_settings(settings) == settings | changed


def test_a_command_is_still_the_same_command():
    command = (
        "torchrun run_alignment.py --config /home/me/a.yaml trainer.output_dir=/scratch/me/run optimization.lr=1e-3"
    )
    expected = "torchrun run_alignment.py --config a.yaml trainer.output_dir=run optimization.lr=1e-3"
    assert public_command(command) == expected


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\0\1hf_" + b"Ab1" * 12, "what looks like a token"),
        (b'"wandb_api_key": "' + b"0f" * 20 + b'"', "what looks like a token"),
        (b"by my-own-secret", "a token"),
        (b"ghp_" + b"a1" * 18, "what looks like a token"),
        (b"at " + str(Path.cwd()).encode() + b"/model.py", "a path of this machine"),
        (b"at " + str(Path.cwd()).encode(), "a path of this machine"),
        (b"/scratch/me", "a path of this machine"),
        (b'"/J\\u00f6rg/run"', "a path of this machine"),
        (b"/data/scratch/me /scratch/meadow", None),
        (b'"pad_token": "' + b"0f" * 20 + b'"', None),
        (b"", None),
        (b"hf_hub_download(0f0f) tokens: 42, sha: " + b"0f" * 20, None),
    ],
)
def test_every_byte_is_looked_at(content: bytes, what: str | None, as_file: bool, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "my-own-secret")
    (tmp_path / "file").write_bytes(content)
    places = [Path("/scratch/me"), Path("/Jörg")]
    files = {"name": tmp_path / "file" if as_file else content}
    if what is None:
        check_private(files, places)
    else:
        with pytest.raises(ConfigError, match=f"^name holds {what} and is not sent: remove it there"):
            check_private(files, places)
