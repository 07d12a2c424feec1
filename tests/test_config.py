import re
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_edgeglass.configuration_edgeglass import POOLING_TYPES
from training.config import POOLING, load_config
from training.config_files import key_error, save_config
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
        (
            "optimization.learning_rat=1",
            "there is no key 'optimization.learning_rat'; valid keys: lr, weight_decay",
        ),
        ("optimization.warmup=1", "there is no key 'optimization.warmup'; did you mean 'warmup_ratio'?"),
        ("datasett.batch_size=1", "there is no key 'datasett'; did you mean 'dataset'?"),
        ("optimization.lr=fast", "optimization.lr: Value 'fast' of type 'str' could not be converted to Float"),
        ("dataset.batch_size=1.5", "dataset.batch_size: Value '1.5' of type 'float' could not be converted"),
        ("vision_encoder.mrl_dimensions=[big]", "vision_encoder.mrl_dimensions: Value 'big'"),
        ("dataset.train_parquet=${oc.env:HOME}", "${oc.env:...: a config is data"),
        ("dataset.train_parquet=${oc.${trainer.run_name}:HOME}", "${oc.${trainer.run_name...: a config is data"),
        ("optimization=3", "optimization is a section of keys, not the value 3"),
        ("lr", "'lr': an override looks like section.key=value"),
        ("vision_encoder.projection_dim=64", "vision_encoder.projection_dim: 64 differs from text_encoder's 4096"),
        ("dataset=${trainer}", "dataset is a section of keys, not the value '${trainer}'"),
        ("dataset.train_parquet=[a", "dataset.train_parquet=[a: its value is no YAML: while parsing a flow sequence"),
        ("trainer.run_name=${nope.key}", "trainer.run_name: Interpolation key 'nope.key' not found"),
        ("trainer.run_name=${", "trainer.run_name=${: its value is no YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(path: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        *((f"dataset.{split}_parquet={value}", "must be a file, a glob, or a list of them, got")
          for split in ("train", "val") for value in ("null", "3", "[]", "[3]", "")),
        ("dataset.test_parquet=3", "must be a file, a glob, or a list of them, or null, got 3"),
        ("dataset.batch_size=0", "must be 1 or more, got 0"),
        ("dataset.text_dropout_prob=2", "must be in 0..1, got 2.0"),
        ("dataset.max_text_length=0", "must be 1 or more, got 0"),
        ("dataset.image_size=1", "must be 8 or more, or null, got 1"),
        ("dataset.on_bad_sample=hope", "must be replace or raise, got 'hope'"),
        ("dataset.max_bad_fraction=1.1", "must be in 0..1, got 1.1"),
        ("dataset.max_bad_fraction=-1", "must be in 0..1, got -1.0"),
        ("text_encoder.pooling_type=max", "must be simple, multihead or statistics, got 'max'"),
        ("losses.contrastive=-1", "must be 0 or more, got -1.0"),
        ("losses.mrl=-1", "must be 0 or more, got -1.0"),
        ("optimization.lr=-1", "must be above 0, got -1.0"),
        ("optimization.lr=nan", "must be above 0, got nan"),
        ("optimization.weight_decay=-0.1", "must be 0 or more, got -0.1"),
        ("optimization.betas=[0.9]", "must be two numbers in 0..1 and below 1, got [0.9]"),
        ("optimization.betas=[0.9,2]", "must be two numbers in 0..1 and below 1, got [0.9, 2.0]"),
        ("optimization.max_grad_norm=-1", "must be 0 or more, got -1.0"),
        ("optimization.warmup_ratio=7", "must be in 0..1 and below 1, got 7.0"),
        ("optimization.on_nan=hope", "must be stop or skip, got 'hope'"),
        ("optimization.early_stopping_patience=0", "must be 1 or more, or null, got 0"),
        ("trainer.output_dir=null", "must be a directory, got None"),
        ("trainer.output_dir=' '", "must be a directory, got ' '"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_the_override_the_key_and_the_range(path: Path, override: str, message: str):
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    assert str(caught.value).startswith(f"{override}: {override.partition('=')[0]}: {message}")


def test_sizes_and_weights_must_go_together(path: Path):
    sizes = [f"{side}_encoder.mrl_dimensions=[16, 4096]" for side in ("vision", "text")]
    with pytest.raises(ConfigError, match=r"vision_encoder\.mrl_dimensions: must lie in 1\.\.4095, .* got 4096"):
        load_config(path, sizes)
    with pytest.raises(ConfigError, match=r"losses\.mrl: both weights of the loss are 0"):
        load_config(path, ["losses.contrastive=0", "losses.mrl=0"])
    assert load_config(path, ["losses.contrastive=0"]).losses.contrastive == 0


def test_the_pooling_types_are_the_models_own():
    assert POOLING[0].replace(" or ", ", ") == ", ".join(POOLING_TYPES)


def test_an_error_names_what_last_set_the_key(path: Path):
    path.write_text(MINIMAL + "optimization: {lr: -1, warmup_ratio: 0.5}\n")
    with pytest.raises(ConfigError, match=re.escape(f"{path}: optimization.lr: must be above 0, got -1.0")):
        load_config(path, ["optimization.warmup_ratio=0.2"])
    with pytest.raises(ConfigError, match=r"^optimization\.lr=-2: optimization\.lr: must be above 0, got -2\.0"):
        load_config(path, ["optimization.lr=-2"])
    config = load_config(path, ["optimization.lr=1"])
    assert str(key_error(config, "optimization.lr", "no")) == "optimization.lr=1: optimization.lr: no"
    assert str(key_error(config, "optimization.warmup_ratio", "no")) == f"{path}: optimization.warmup_ratio: no"
    assert str(key_error(config, "dataset.batch_size", "no")) == f"{path}: dataset.batch_size: no"  # its default


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optimizer: {lr: 1}\n", "run.yaml: there is no key 'optimizer'; did you mean 'optimization'?"),
        ("- a\n", "run.yaml: holds no sections; it wants dataset, vision_encoder"),
        ("a: [\n", "run.yaml: is no YAML:"),
        ("dataset: 3\n", "run.yaml: dataset is a section of keys, not the value 3"),
        ("dataset: ???\n", "run.yaml: dataset is a section of keys, not the value '???'"),
        ("", "run.yaml: dataset.train_parquet: is not set"),
        (MINIMAL + "optimization: {lr: '${nope.key}'}\n", "run.yaml: optimization.lr: Interpolation key 'nope.key'"),
        (MINIMAL + "vision_encoder: {pooling_type: max}\n", "run.yaml: vision_encoder.pooling_type: must be simple, "),
        (MINIMAL.replace("out}", "}"), "run.yaml: trainer.output_dir: must be a directory, got None"),
        ("dataset: {train_parquet: a, val_parquet: b}\n", "run.yaml: trainer.output_dir: is not set"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(path: Path, content: str, message: str):
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(path: Path):
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: is no YAML: it is not in UTF-8"):
        load_config(path)


OWN_MISTAKES = [
    "optimization.lr=-1",
    "optimization.learning_rat=1",
    "optimization.early_stopping_patience=2",  # of a run that never evaluates
    "dataset.cache=memory",
    "optimization.init=closed",
    "optimization.spectral_ridge=[1.0]",
    "optimization.spectral_ridge=[1.0,-1]",
    "optimization.spectral_ridge=best",
    "optimization.spectral_power=-1",
    "losses={contrastive: 0, mrl: 0}",
    "vision_encoder.projection_dim=64",
    "trainer.output_dir=null",
    "trainer.resume=maybe",
    "trainer.epochs=soon",
    "trainer.epochs=0",
    "trainer.learning_rate=3",
]
START = """
import sys, run_alignment
config, *mistakes = sys.argv[1:]
for arguments in [["--help"], *(["--config", config, mistake] for mistake in mistakes)]:
    sys.argv[1:] = arguments
    try:
        run_alignment.main()
    except SystemExit as end:
        print("ended:", end)
    assert not {"torch", "transformers", "datasets"} & set(sys.modules)
"""


def test_neither_help_nor_a_mistake_in_our_own_sections_waits_for_torch(path: Path):
    path.write_text(MINIMAL.replace("out}", "out, eval_strategy: no}"))
    command = [sys.executable, "-c", START, str(path), *OWN_MISTAKES]
    done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, help_end, *ends = done.stdout.split("ended: ")
    assert help_end.strip() == "0"
    for mistake, end in zip(OWN_MISTAKES, ends, strict=True):
        assert end.startswith(f"error: {mistake}: "), end


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml")
