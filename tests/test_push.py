"""A finished run goes to a Hub on loopback, and comes back."""

import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy
import pytest
import torch
from huggingface_hub import ModelCard

from modeling_edgeglass import truncate_embeds
from run_alignment import align
from tests.bare_environment import make_bare_environment
from tests.commands import final_metrics, start
from tests.conftest import picture, write_pairs, write_run_config
from tests.hub_server import HubServer
from tests.pushing import REPO, run_snippet, sent, snippets
from training.build import load_model, save_alignment
from training.config import load_config
from training.errors import ConfigError
from training.export import export
from training.push import main, push, repository_of
from training.signals import SignalListener


@pytest.fixture(scope="module")
def finished(vision_dir: str, text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of a run, with its encoders as ONNX files."""
    config = write_run_config(tmp_path_factory.mktemp("pushed"), vision_dir, text_dir)
    run = load_config(config, ["trainer.epochs=1", "vision_encoder.feature_layers=[-1,-2]"])
    assert align(run, SignalListener()) == 0
    output_dir = config.parent / "run"
    export(Namespace(output_dir=output_dir, truncate_dim=None, output=None, parquet=None))
    return output_dir


@pytest.fixture
def output_dir(finished: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def num_uploads(hub: HubServer) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


def test_a_pushed_run_comes_back_with_the_same_bits(finished: Path, hub: HubServer, tmp_path: Path):
    hub.run("-m", "training.push", finished, REPO, home=tmp_path / "pusher")  # by HF_ENDPOINT, as the user would
    assert hub.repositories[REPO].private
    assert len(hub.repositories[REPO].commits) == 2  # the Hub's own, which makes the repository, and one of ours
    code = """
import sys, torch
from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from tests.conftest import picture
from PIL import Image
import io
name, target = sys.argv[1:]
model, processor = EdgeGlassModel.from_pretrained(name), EdgeGlassProcessor.from_pretrained(name)
inputs = processor(images=[Image.open(io.BytesIO(picture(text))) for text in "abc"], text=["a b", "c", "d e f"])
torch.save(model(**inputs).to_tuple(), target)
"""
    for name, target in ((REPO, "pushed.pt"), (finished / "model", "local.pt")):
        hub.run("-c", code, name, tmp_path / target, home=tmp_path / "home")
    pushed, local = (torch.load(tmp_path / name) for name in ("pushed.pt", "local.pt"))
    assert all(map(torch.equal, pushed, local))
    files = sent(hub)
    assert files["metrics.json"] == (finished / "final_metrics.json").read_bytes()
    assert {"plots/training_curves.png", "training_config.yaml", "modules.json", "README.md"} < set(files)


def test_what_is_pushed_tells_no_token_and_no_place(finished: Path, hub: HubServer, vision_dir: str):
    push(finished, REPO)
    here = (hub.token, str(finished.parent), vision_dir, str(Path.home()) + "/", "/tmp")
    for name, content in sent(hub).items():
        assert [secret for secret in here if secret.encode() in content] == [], name
    assert b"train_parquet: train.parquet" in sent(hub)["training_config.yaml"]


@pytest.mark.parametrize("secret", ["hf_test", "hf_" + "a" * 34, str(Path.cwd()) + "/notes.txt"])
def test_a_file_with_a_token_or_a_place_in_it_is_not_sent(output_dir: Path, hub: HubServer, secret: str):
    (output_dir / "model" / "notes.txt").write_text(f"by {secret}")
    with pytest.raises(
        ConfigError, match=r"notes\.txt holds (a token|a path of this machine|what looks like a token)"
    ):
        push(output_dir, REPO)
    assert hub.requests == []


def test_a_push_that_was_cut_off_sends_what_is_missing(output_dir: Path, hub: HubServer):
    hub.fail_uploads_after = 2
    with pytest.raises(
        ConfigError, match=rf"{REPO}: Error while uploading .*; the same command sends what is missing"
    ):
        push(output_dir, REPO)
    repository = hub.repositories[REPO]
    held, hub.fail_uploads_after = len(repository.objects), None
    assert held == 2
    assert len(repository.commits) == 1
    hub.requests.clear()
    push(output_dir, REPO)
    assert num_uploads(hub) == len(repository.objects) - held > 0
    assert len(repository.commits) == 2
    hub.requests.clear()
    push(output_dir, REPO)
    assert num_uploads(hub) == 0
    assert len(repository.commits) == 2


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(output_dir: Path, hub: HubServer, monkeypatch):
    push(output_dir, REPO)
    monkeypatch.setattr("training.build.MAX_SHARD_SIZE", "50KB")
    model, _ = load_model(str(output_dir / "model"))
    (output_dir / "model" / "model.safetensors").unlink()
    save_alignment(model, output_dir / "model")
    push(output_dir, REPO)
    files = set(sent(hub))
    assert "model.safetensors" not in files
    assert "model.safetensors.index.json" in files
    assert len([name for name in files if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]) > 1
    assert len(hub.repositories[REPO].commits) == 3


def test_a_dry_run_lists_what_would_go_and_asks_nobody(finished: Path, hub: HubServer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["push", str(finished), REPO, "--dry_run"])
    main()
    listed = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["push", str(finished), REPO, "--public"])
    assert hub.requests == []
    main()
    assert not hub.repositories[REPO].private
    assert set(re.findall(r"MB  (.+)", listed)) == set(sent(hub)) - {".gitattributes"}
    assert "files would go to tester/colours (private, if it is new)" in listed


def test_errors_of_the_hub_are_one_line(finished: Path, hub: HubServer, monkeypatch):
    def error(repo_id: str = REPO) -> str:
        with pytest.raises(ConfigError) as caught:
            push(finished, repo_id)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "'a/b/c' is no id of a repository: it reads user/name" in error("a/b/c")
    assert "your token may not write there" in error("somebody/colours")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "run `hf auth login`" in error()
    assert "run `hf auth login`" in error("colours")
    monkeypatch.delenv("HF_TOKEN")
    assert "run `hf auth login`" in error()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in error()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error()


def test_a_name_alone_is_ones_own(finished: Path, hub: HubServer):
    push(finished, "colours")
    assert f'from_pretrained("{REPO}"' in sent(hub)["README.md"].decode()


def test_what_everybody_sees_is_not_pushed_to_by_accident(finished: Path, hub: HubServer):
    push(finished, REPO, private=False)
    with pytest.raises(ConfigError, match=f"{REPO} is there, and everybody sees it: .* --public or trainer.hub_priv"):
        push(finished, REPO)
    assert len(hub.repositories[REPO].commits) == 2


def test_what_was_made_of_other_weights_is_left_out_and_taken_away(output_dir: Path, hub: HubServer, caplog):
    command = [
        "-m",
        "training.evaluate",
        output_dir / "model",
        output_dir.parents[0] / "test.parquet",
        "--batch-size",
        4,
    ]
    write_pairs(output_dir.parents[0] / "test.parquet", 6, first=30)
    start(sys.executable, *command)
    (output_dir / "onnx" / ".DS_Store").write_text("of a Mac")
    push(output_dir, REPO)
    files = sent(hub)
    assert {"onnx/image_encoder.onnx", "onnx/export.json"} < set(files)
    assert "onnx/.DS_Store" not in files
    card = files["README.md"].decode()
    assert "`test`:" in card
    assert {result.dataset_split for result in ModelCard(card).data.eval_results} == {"val", "test"}
    model, _ = load_model(str(output_dir / "model"))
    torch.nn.init.ones_(model.logit_scale)
    save_alignment(model, output_dir / "model")
    push(output_dir, REPO)
    files = sent(hub)
    assert not [name for name in files if name.startswith("onnx/")]
    assert "is no export of these weights and is left out" in caplog.text
    assert "`test`:" not in files["README.md"].decode()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "config.yaml").write_text("dataset: [unclosed"), r"config\.yaml: is damaged"),
        (lambda run: (run / "model" / "config.json").write_text("{"), r"model/config\.json: is damaged"),
        (lambda run: (run / "environment.json").write_text("[]"), r"environment\.json: is damaged"),
        (lambda run: (run / "emissions.csv").write_text("a,b\n1,2\n"), r"emissions\.csv: is no file of CodeCarbon's"),
        (lambda run: (run / "final_metrics.json").unlink(), r"holds no finished run: there is no final_metrics\.json"),
        (lambda run: shutil.rmtree(run / "model"), r"holds no finished run: there is no model/config\.json"),
        (
            lambda run: (run / "model" / "config.json").write_text('{"model_type": "vit"}'),
            "holds a model of type 'vit', which is none of ours",
        ),
    ],
)
def test_what_cannot_be_pushed_is_told(output_dir: Path, spoil, message: str):
    spoil(output_dir)
    with pytest.raises(ConfigError, match=message):
        push(output_dir, REPO)


def test_a_card_that_the_hub_refuses_is_told(finished: Path, hub: HubServer):
    with pytest.raises(ConfigError, match=r"the Hub refuses the model card: .*license"):
        push(finished, REPO, licence="mine")


def test_the_card_tells_the_run(output_dir: Path, hub: HubServer):
    (output_dir / "emissions.csv").write_text("run_id,emissions\na,0.001\na,0.002\nb,0.0005\n")
    push(output_dir, REPO, licence="apache-2.0")
    text = sent(hub)["README.md"].decode()
    card, metrics = ModelCard(text), final_metrics(output_dir)
    assert card.data.license == "apache-2.0"
    assert card.data.co2_eq_emissions["emissions"] == 2.5  # grams, the last of each session
    assert "2.5 g of CO2 equivalents" in text
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results == {
        f"{way} R@1{words}": round(metrics[f"val/{key}_r1{size}"], 4)
        for way, key in (("image to text", "i2t"), ("text to image", "t2i"))
        for words, size in (("", ""), (", 32 numbers", "@32"), (", 16 numbers", "@16"))
    }
    for size, name in ((64, ""), (32, "@32"), (16, "@16")):
        row = " | ".join(f"{100 * metrics[f'val/{way}_r{k}{name}']:.1f}" for way in ("i2t", "t2i") for k in (1, 5, 10))
        assert f"| {size} | {row} |" in text
    assert "`train.parquet`, 20 pairs" in text
    assert "layers -1, -2; text simple, layers -1 |" in text
    assert all(cited in text for cited in ("2103.00020", "2205.13147", "2409.17146"))
    assert "%" not in re.sub(r"\d+ %", "", text)  # no format that was left unfilled


def test_every_snippet_of_the_card_runs_where_its_packages_alone_are(finished: Path, hub: HubServer, tmp_path: Path):
    push(finished, REPO)
    blocks = snippets(sent(hub))
    assert all(block.count("\n") <= 6 for block in blocks)
    (tmp_path / "picture.png").write_bytes(picture("a horse"))
    with_transformers = make_bare_environment(tmp_path / "transformers", "torch", "transformers", "pillow")
    interpreters = {
        "AutoModel": with_transformers,
        "pipeline": with_transformers,
        "modeling_edgeglass": Path(sys.executable),
        "sentence_transformers": make_bare_environment(tmp_path / "peer", "sentence-transformers", "pillow"),
        "onnxruntime": make_bare_environment(tmp_path / "edge", "onnxruntime", "tokenizers", "huggingface_hub"),
    }
    assert len(blocks) == len(interpreters)
    model, processor = load_model(str(finished / "model"))
    expected = {
        "image_embeds": model.get_image_features(**processor(images=str(tmp_path / "picture.png"))),
        "text_embeds": model.get_text_features(**processor(text=["a horse", "a yellow circle"])),
    }
    for package, interpreter in interpreters.items():
        (block,) = [block for block in blocks if f"import {package}" in block or f"from {package}" in block]
        name = "text_embeds" if package == "onnxruntime" else "image_embeds"
        run_snippet(hub, interpreter, f"{block}\nimport numpy\nnumpy.save('found.npy', {name})", tmp_path)
        found = torch.from_numpy(numpy.load(tmp_path / "found.npy"))
        size = 16 if name == "image_embeds" and package != "pipeline" else 64
        torch.testing.assert_close(found, truncate_embeds(expected[name], size).detach(), rtol=1e-5, atol=1e-5)


def test_a_run_can_push_itself(vision_dir: str, text_dir: str, hub: HubServer, tmp_path: Path, capsys, monkeypatch):
    config = write_run_config(tmp_path, vision_dir, text_dir)
    overrides = ["trainer.epochs=1", "trainer.push_to_hub=true", f"trainer.hub_model_id={REPO}"]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="run `hf auth login`"):  # before it trains
        align(load_config(config, overrides), SignalListener())
    assert not list(tmp_path.glob("run/checkpoint-*"))
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.fail_uploads_after = 0
    assert align(load_config(config, overrides), SignalListener()) == 1
    output = capsys.readouterr().out
    assert f"python -m training.push {tmp_path / 'run'} {REPO} tries again" in output
    assert len(hub.repositories[REPO].commits) == 1
    assert (tmp_path / "run" / "final_metrics.json").exists()  # nothing is lost
    hub.fail_uploads_after = None
    assert align(load_config(config, [*overrides, f"trainer.output_dir={tmp_path}/other"]), SignalListener()) == 0
    assert "pushed: " in capsys.readouterr().out
    assert len(hub.repositories[REPO].commits) == 2
    assert hub.repositories[REPO].private


def test_where_a_run_is_pushed_to():
    section = {"output_dir": "outputs/mine", "push_to_hub": True}
    assert repository_of(section) == ("mine", True)
    assert repository_of(section | {"hub_model_id": "me/it", "hub_private_repo": False}) == ("me/it", False)
    assert repository_of(section | {"push_to_hub": False}) == (None, True)
