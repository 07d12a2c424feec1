"""One directory, loaded the ways that people know, where this package is not installed."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from modeling_edgeglass import (
    EdgeGlassDecodingProcessor,
    EdgeGlassForConditionalGeneration,
    EdgeGlassModel,
    EdgeGlassProcessor,
)
from tests.bare_environment import make_bare_environment
from tests.language_models import save_tiny_language_model
from training.build import load_model, save_alignment
from training.errors import ConfigError

SENTENCES = ["a red dot", "a longer sentence about a blue bar", "moon"]


@pytest.fixture(scope="module")
def repository(vision_dir: str, text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An alignment as a run saves it."""
    folder = tmp_path_factory.mktemp("alignment") / "model"
    torch.manual_seed(0)
    model = EdgeGlassModel.from_vision_text_pretrained(
        vision_dir, text_dir, projection_dim=64, mrl_dimensions=[16], text_pooling_type="statistics"
    )
    save_alignment(model, folder)
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of pictures, the second half transparent."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.effect_mandelbrot((50, 40), (-2, -1.5, 1, 1.5), 50).convert("RGB").save(folder / "a.png")
    Image.new("RGBA", (30, 60), (255, 0, 0, 120)).save(folder / "b.png")
    return [str(folder / "a.png"), str(folder / "b.png")]


@pytest.fixture(scope="module")
def embeds(repository: Path, pictures: list[str]) -> dict[str, Tensor]:
    """With this package."""
    model, processor = load_model(str(repository))
    with torch.no_grad():
        return {
            "images": model.get_image_features(**processor(images=pictures)),
            "texts": model.get_text_features(**processor(text=SENTENCES)),
        }


def run(interpreter: Path, code: str, folder: Path) -> dict[str, Tensor]:
    """What the variable `found` holds behind some lines of Python, run by another interpreter."""
    guard = "import importlib.util\nassert importlib.util.find_spec('modeling_edgeglass') is None\nimport torch\n"
    end = "\ntorch.save(found, 'found.pt')\n"
    folder.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [interpreter, "-c", guard + code + end],
        cwd=folder,
        env=environment | {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Tensor] = torch.load(folder / "found.pt", weights_only=True)
    return found


def test_transformers_alone_loads_it(repository: Path, pictures: list[str], embeds, tmp_path: Path):
    interpreter = make_bare_environment(tmp_path / "environment", "torch", "transformers", "pillow")
    code = f"""
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

options = {{"pretrained_model_name_or_path": {str(repository)!r}, "trust_remote_code": True}}
assert AutoConfig.from_pretrained(**options).projection_dim == 64
model, processor = AutoModel.from_pretrained(**options), AutoProcessor.from_pretrained(**options)
found = {{
    "images": model.get_image_features(**processor(images={pictures})),
    "texts": model.get_text_features(**processor(text={SENTENCES})),
}}
picture = Image.open({pictures[0]!r})
extract = pipeline("image-feature-extraction", model={str(repository)!r}, trust_remote_code=True)
found["features"] = extract(picture, return_tensors=True)[0]
classify = pipeline("zero-shot-image-classification", model={str(repository)!r}, trust_remote_code=True)
scores = {{line["label"]: line["score"] for line in classify(picture, {SENTENCES}, hypothesis_template="{{}}")}}
found["scores"] = torch.tensor([scores[sentence] for sentence in {SENTENCES}])
model.save_pretrained("again")
processor.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("again", trust_remote_code=True)
found["again"] = again.get_image_features(**processor(images={pictures}))
"""
    found = run(interpreter, code, tmp_path / "run")
    torch.testing.assert_close(found["images"], embeds["images"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["texts"], embeds["texts"], rtol=1e-5, atol=1e-6)
    assert torch.equal(found["again"], found["images"])
    torch.testing.assert_close(found["features"], found["images"][0], rtol=1e-5, atol=1e-6)
    scale = load_model(str(repository))[0].logit_scale.exp()
    expected = (scale * embeds["texts"] @ embeds["images"][0]).softmax(dim=0)  # CLIP's convention
    torch.testing.assert_close(found["scores"], expected.detach())


def test_sentence_transformers_loads_it(repository: Path, pictures: list[str], embeds, tmp_path: Path):
    interpreter = make_bare_environment(tmp_path / "environment", "sentence-transformers", "pillow")
    code = f"""
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.util import quantize_embeddings, semantic_search

model = SentenceTransformer({str(repository)!r}, trust_remote_code=True, truncate_dim=16)
assert model.get_embedding_dimension() == 16
images = [Image.open(path) for path in {pictures}]
found = {{"images": model.encode(images, convert_to_tensor=True)}}
found["texts"] = model.encode({SENTENCES}, convert_to_tensor=True)
found["full"] = model.encode({SENTENCES}, truncate_dim=64, convert_to_tensor=True)
found["int8"] = torch.from_numpy(quantize_embeddings(found["texts"].numpy(), precision="int8"))
found["binary"] = torch.from_numpy(model.encode({SENTENCES}, precision="ubinary"))
hits = semantic_search(found["texts"], found["images"], top_k=2)
found["hits"] = torch.tensor([[hit["corpus_id"] for hit in line] for line in hits])
texts = dict(zip("abc", {SENTENCES}))
evaluator = InformationRetrievalEvaluator(texts, texts, {{name: {{name}} for name in texts}}, accuracy_at_k=[1])
found["accuracy"] = torch.tensor(evaluator(model)["cosine_accuracy@1"])
model.save_pretrained("again", create_model_card=False)
found["again"] = SentenceTransformer("again", trust_remote_code=True).encode({SENTENCES}, convert_to_tensor=True)
"""
    found = run(interpreter, code, tmp_path / "run")
    for name in ("images", "texts"):
        expected = torch.nn.functional.normalize(embeds[name][:, :16], dim=-1)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["full"], embeds["texts"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["again"], found["texts"], rtol=1e-5, atol=1e-6)
    assert found["int8"].dtype == torch.int8
    bits = torch.tensor(
        [[byte >> bit & 1 for byte in row for bit in range(7, -1, -1)] for row in found["binary"].tolist()]
    )
    assert torch.equal(bits, (found["texts"] > 0).long())
    order = (found["texts"] @ found["images"].T).argsort(dim=1, descending=True)
    assert torch.equal(found["hits"], order)
    assert found["accuracy"] == 1


def test_transformers_alone_loads_a_whole_decoder(repository: Path, pictures: list[str], tmp_path: Path):
    interpreter = make_bare_environment(tmp_path / "environment", "torch", "transformers", "pillow")
    ends = str(repository), save_tiny_language_model(tmp_path / "language")
    torch.manual_seed(0)
    decoder = EdgeGlassForConditionalGeneration.from_alignment_pretrained(*ends).eval()
    decoder.save_pretrained(tmp_path / "decoder")
    processor = EdgeGlassDecodingProcessor.from_alignment_pretrained(*ends, prompt="what is it?")
    processor.save_pretrained(tmp_path / "decoder")
    code = f"""
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

options = {{"pretrained_model_name_or_path": {str(tmp_path / "decoder")!r}, "trust_remote_code": True}}
assert AutoConfig.from_pretrained(**options).model_type == "edgeglass_decoding"
model, processor = AutoModelForImageTextToText.from_pretrained(**options), AutoProcessor.from_pretrained(**options)
inputs = processor(images={pictures}, text=[processor.prompt] * 2)
found = {{"ids": model.generate(**inputs, max_new_tokens=8, do_sample=False), "logits": model(**inputs).logits}}
"""
    found = run(interpreter, code, tmp_path / "run")
    inputs = processor(images=pictures, text=["what is it?"] * 2)
    assert torch.equal(found["ids"], decoder.generate(**inputs, max_new_tokens=8, do_sample=False))
    torch.testing.assert_close(found["logits"], decoder(**inputs).logits)


def test_a_sharded_model_loads_as_a_whole_one(repository: Path, embeds, pictures: list[str], tmp_path, monkeypatch):
    model, processor = load_model(str(repository))
    monkeypatch.setattr("training.build.MAX_SHARD_SIZE", "50KB")
    save_alignment(model, tmp_path)
    processor.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, _ = load_model(str(tmp_path))
    torch.testing.assert_close(loaded.get_image_features(**processor(images=pictures)), embeds["images"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/directory", "there is no such directory, and an id on the Hub reads user/name"),
        ("somebody/nothing", "We couldn't connect to"),  # tests have no network
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(name: str, message: str):
    with pytest.raises(ConfigError, match=f"{name}: no EdgeGlass model: {message}") as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


def test_slips_in_the_name_of_a_directory_are_found_before_the_hub_is_asked(repository: Path):
    with pytest.raises(ConfigError, match=rf"is a run's output directory; its model is {repository}$"):
        load_model(str(repository.parent))
    with pytest.raises(ConfigError, match=rf"modle: there is no such directory in {repository.parent}$"):
        load_model(str(repository.with_name("modle")))


def test_a_missing_tokenizer_is_told(repository: Path, tmp_path: Path):
    for file in repository.iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file)
    with pytest.raises(ConfigError, match=r"no EdgeGlass model: .* has no tokenizer\.json"):
        load_model(str(tmp_path))
