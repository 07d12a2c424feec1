import re
from pathlib import Path

import pytest

from training.config import load_config, save_config
from training.errors import ConfigError

MINIMAL = "dataset: {train_parquet: a.parquet, val_parquet: b.parquet}\ntrainer: {output_dir: out}\n"
CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_are_the_recipe(path: Path):
    config = load_config(path)
    assert config.dataset.batch_size == 64
    assert config.dataset.text_dropout_prob == 0.1
    assert config.vision_encoder.model_name == "openai/clip-vit-large-patch14"
    assert config.text_encoder.model_name == "sentence-transformers/all-MiniLM-L6-v2"
    assert config.vision_encoder.mrl_dimensions == [2048, 1024, 512, 256, 128]
    assert (config.losses.contrastive, config.losses.mrl) == (0.25, 1.0)


def test_the_recipe_file_says_what_the_defaults_are(path: Path):
    recipe, defaults = load_config(CONFIGS / "pixmo_alignment.yaml"), load_config(path)
    for section in ("vision_encoder", "text_encoder", "losses", "optimization"):
        assert recipe[section] == defaults[section], section
    paths = {"train_parquet", "val_parquet", "test_parquet"}
    assert all(recipe.dataset[key] == defaults.dataset[key] for key in defaults.dataset if key not in paths)


def test_overrides_win_over_the_file_and_numbers_are_numbers(path: Path):
    path.write_text(MINIMAL + "optimization: {lr: 2e-4}\n")
    assert load_config(path).optimization.lr == 2e-4
    config = load_config(path, ["optimization.lr=1e-3", "trainer.max_steps=4", "dataset.train_parquet=[a,b]"])
    assert config.optimization.lr == 1e-3
    assert config.trainer.max_steps == 4
    assert config.dataset.train_parquet == ["a", "b"]


def test_saving_and_loading_changes_nothing(path: Path, tmp_path: Path):
    config = load_config(path, ["losses.mrl=0.5", "trainer.bf16=true"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.learning_rat=1", "there is no key 'optimization.learning_rat'; valid keys: lr, weight_decay"),
        ("optimization.warmup=1", "there is no key 'optimization.warmup'; did you mean 'warmup_ratio'?"),
        ("datasett.batch_size=1", "there is no key 'datasett'; did you mean 'dataset'?"),
        ("optimization.lr=fast", "optimization.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("dataset.batch_size=1.5", "dataset.batch_size: Value '1.5' of type 'float' could not be converted"),
        ("vision_encoder.mrl_dimensions=[big]", "vision_encoder.mrl_dimensions: Value 'big'"),
        ("dataset.train_parquet=${oc.env:HOME}", "${oc.env:...: a config is data"),
        ("optimization.on_nan=hope", "optimization.on_nan must be stop or skip, got 'hope'"),
        ("dataset.on_bad_sample=hope", "dataset.on_bad_sample must be replace or raise, got 'hope'"),
        ("optimization.lr=-1", "optimization.lr must be positive, got -1.0"),
        ("dataset.max_text_length=0", "dataset.max_text_length must be 1 or more, got 0"),
        ("dataset.image_size=1", "dataset.image_size must be 8 or more, got 1"),
        ("optimization=3", "optimization is a section of keys, not the value 3"),
        ("lr", "'lr': an override looks like section.key=value"),
        ("dataset.batch_size=0", "dataset.batch_size must be positive, got 0"),
        ("dataset.text_dropout_prob=2", "dataset.text_dropout_prob must be in 0..1, got 2.0"),
        ("optimization.betas=[0.9]", "optimization.betas must be two numbers, got [0.9]"),
        ("optimization.warmup_ratio=7", "optimization.warmup_ratio must be in 0..1 and below 1, got 7.0"),
        ("vision_encoder.projection_dim=64", "vision_encoder.projection_dim 64 differs from text_encoder's 4096"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(path: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optimizer: {lr: 1}\n", "run.yaml: there is no key 'optimizer'; did you mean 'optimization'?"),
        ("- a\n", "run.yaml: holds no sections; it wants dataset, vision_encoder"),
        ("a: [\n", "run.yaml: is no YAML:"),
        ("dataset: 3\n", "run.yaml: dataset is a section of keys, not the value 3"),
        ("", "run.yaml: dataset.train_parquet is not set"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(path: Path, content: str, message: str):
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml")
