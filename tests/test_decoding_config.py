"""A decoding run's config: the recipe, and what is refused."""

import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from modeling_edgeglass.configuration_edgeglass import LANGUAGE_TRAININGS, EdgeGlassDecodingConfig
from tests.commands import ROOT
from training.config_files import save_config
from training.decoding.config import LANGUAGE_TRAINING, load_decoding_config
from training.errors import ConfigError

MINIMAL = """\
dataset: {train_parquet: a.parquet, val_parquet: b.parquet}
decoding: {alignment: model}
trainer: {output_dir: out}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "decoding.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_those_of_the_model(path: Path):
    bridge, model = load_decoding_config(path).decoding, EdgeGlassDecodingConfig()
    for name in ("num_prefix_tokens", "language_training", "lora_rank", "lora_alpha", "lora_target_modules"):
        assert bridge[name] == getattr(model, name), name
    assert bridge.language_model == "Qwen/Qwen2.5-7B-Instruct"
    assert all(LANGUAGE_TRAINING[1](name) for name in LANGUAGE_TRAININGS)


def test_the_recipe_file_says_what_the_defaults_are(path: Path):
    recipe, defaults = load_decoding_config(ROOT / "configs/qwen_decoding.yaml"), load_decoding_config(path)
    differing = {
        f"{section}.{key}"
        for section in ("dataset", "decoding", "optimization", "generation")
        for key, value in recipe[section].items()
        if value != defaults[section][key]
    }
    assert differing == {"dataset.train_parquet", "dataset.val_parquet", "decoding.alignment", "optimization.lr"}
    stated = OmegaConf.load(ROOT / "configs/qwen_decoding.yaml")
    assert set(stated.decoding) == set(defaults.decoding)
    assert set(stated.generation) == set(defaults.generation)


def test_saving_and_loading_changes_nothing(path: Path, tmp_path: Path):
    config = load_decoding_config(path, ["decoding.lora_target_modules=[q_proj,v_proj]", "dataset.cache=off"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_decoding_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoding.language_training=some", "must be frozen, lora or full, got 'some'"),
        ("dataset.source=audio", "must be images or text, got 'audio'"),
        ("dataset.text_dropout_prob=0.1", "there is no key 'dataset.text_dropout_prob'"),
        ("optimization.init=spectral", "there is no key 'optimization.init'"),
        ("decoding.langauge_model=x", "did you mean 'language_model'?"),
        ("generation.num_samples=-1", "must be 0 or more, got -1"),
        ("trainer.epochs=0", "must be above 0, got 0"),
        ("trainer.learning_rate=1", "set optimization.lr instead"),
        ("decoding.lora_target_modules=3", "must be all-linear, or a list of names, got 3"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(path: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_decoding_config(path, [override])
    assert str(caught.value).startswith((override, str(path)))
    assert "\n" not in str(caught.value)


def test_four_bits_do_not_train(path: Path):
    with pytest.raises(ConfigError, match=r"weights of 4 bits cannot train; set decoding\.language_training"):
        load_decoding_config(path, ["decoding.load_in_4bit=true", "decoding.language_training=full"])


def test_an_alignment_must_be_named(path: Path):
    path.write_text(MINIMAL.replace("decoding: {alignment: model}\n", ""))
    with pytest.raises(ConfigError, match=r"decoding\.alignment: is not set"):
        load_decoding_config(path)
