"""A decoder goes to the Hub: a bridge when its ends are there, or the whole."""

import shutil
from pathlib import Path

import pytest
import torch

from run_decoding import decode
from tests.bare_environment import make_bare_environment
from tests.conftest import picture
from tests.decoding_runs import write_decoding_config
from tests.hub_repositories import File, Repository
from tests.hub_server import HubServer
from tests.pushing import REPO, run_snippet, sent, snippets
from training.decoding.build import load_decoder
from training.decoding.config import load_decoding_config
from training.errors import ConfigError
from training.push import push
from training.signals import SignalListener


@pytest.fixture(scope="module")
def described(vision_dir: str, text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a decoding run, which holds the bridge alone."""
    config = write_decoding_config(tmp_path_factory.mktemp("described"), vision_dir, text_dir)
    quick = ["trainer.epochs=1", "generation.num_scored=0", "generation.num_samples=2"]
    assert decode(load_decoding_config(config, quick), SignalListener()) == 0
    return config.parent / "run"


DECODE = """
import sys, torch
from training.decoding.build import load_decoder
model, processor = load_decoder(sys.argv[1])
embeds = torch.eye(3, 64)
torch.save(model.generate(image_embeds=embeds, max_new_tokens=6, min_new_tokens=6, do_sample=False), sys.argv[2])
"""


def test_a_bridge_is_pushed_when_its_ends_are(described: Path, hub: HubServer, tmp_path: Path):
    with pytest.raises(
        ConfigError, match=r"holds a bridge to .*/alignment, which lies on this machine alone: .*--align"
    ):
        push(described, REPO)
    config = load_decoding_config(described / "config.yaml", ["trainer.push_to_hub=true"])
    with pytest.raises(ConfigError, match=r"trainer\.push_to_hub: decoding\.alignment is a directory of this machine"):
        decode(config, SignalListener())
    assert hub.requests == []
    for name in ("alignment", "language"):
        hub.repositories[f"tester/{name}"] = Repository(private=True)
        folder = described.parent / name
        files = {path.relative_to(folder).as_posix(): File(path.read_bytes()) for path in folder.rglob("*.*")}
        hub.repositories[f"tester/{name}"].commit("by hand", files)
    push(described, REPO, alignment="tester/alignment", language_model="tester/language")
    for name, target in ((REPO, "pushed.pt"), (described / "model", "local.pt")):
        hub.run("-c", DECODE, name, tmp_path / target, home=tmp_path / "home")
    assert torch.equal(torch.load(tmp_path / "pushed.pt"), torch.load(tmp_path / "local.pt"))
    card = sent(hub)["README.md"].decode()
    assert 'from_bridge_pretrained("tester/colours")' in card
    assert "base_model:\n- tester/alignment\n- tester/language" in card
    assert str(described.parent).encode() not in b"".join(sent(hub).values())


def test_a_whole_decoder_is_pushed_as_it_is(described: Path, hub: HubServer, tmp_path: Path):
    model, processor = load_decoder(str(described / "model"))
    output_dir = Path(shutil.copytree(described, tmp_path / "run"))
    shutil.rmtree(output_dir / "model")
    model.save_pretrained(output_dir / "model")
    processor.save_pretrained(output_dir / "model")
    with pytest.raises(ConfigError, match="is whole: it names no alignment and no language model that could be exch"):
        push(output_dir, REPO, alignment="tester/alignment")
    push(output_dir, REPO)
    (tmp_path / "picture.png").write_bytes(picture("a horse"))
    bare = make_bare_environment(tmp_path / "transformers", "torch", "transformers", "pillow")
    (block,) = [block for block in snippets(sent(hub)) if "AutoModelForImageTextToText" in block]
    model.generation_config.max_new_tokens = 32
    inputs = processor(images=str(tmp_path / "picture.png"), text=processor.prompt)
    expected = processor.decode_answers(model.generate(**inputs, max_new_tokens=32, truncate_dim=16))
    code = f"{block}\nassert model.generate(**inputs, max_new_tokens=32, truncate_dim=16).shape[0] == 1"
    done = run_snippet(hub, bare, code, tmp_path)
    assert done.strip() == str(expected)
