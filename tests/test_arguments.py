import re
from pathlib import Path

import pytest

from training.arguments import build_training_arguments
from training.config import load_config
from training.errors import ConfigError


def test_the_recipe_reaches_trainer(run_config: Path):
    args = build_training_arguments(load_config(run_config, ["optimization.lr=3e-4", "dataset.batch_size=6"]))
    assert args.learning_rate == 3e-4
    assert (args.adam_beta1, args.adam_beta2) == (0.9, 0.95)
    assert (args.weight_decay, args.max_grad_norm) == (0.01, 1.0)
    assert args.get_warmup_steps(50) == 5
    assert args.lr_scheduler_type == "cosine"
    assert args.per_device_train_batch_size == args.per_device_eval_batch_size == 6
    assert args.num_train_epochs == 2
    assert args.load_best_model_at_end
    assert args.metric_for_best_model == "loss"
    assert args.greater_is_better is False
    assert args.logging_nan_inf_filter is False


def test_any_field_of_training_arguments_passes(run_config: Path):
    overrides = ["trainer.gradient_accumulation_steps=3", "trainer.eval_strategy=no", "trainer.bf16=true"]
    args = build_training_arguments(load_config(run_config, overrides))
    assert args.gradient_accumulation_steps == 3
    assert args.bf16
    assert args.eval_strategy == "no"
    assert args.load_best_model_at_end is False
    run_config.write_text(run_config.read_text() + "  eval_strategy: no\n")  # which YAML reads as false
    assert build_training_arguments(load_config(run_config)).eval_strategy == "no"
    steps = build_training_arguments(load_config(run_config, ["trainer.eval_strategy=steps", "trainer.eval_steps=5"]))
    assert steps.save_strategy == "steps"
    assert steps.save_steps == 5  # so that the best model is there to load
    assert not build_training_arguments(load_config(run_config, ["trainer.save_strategy=no"])).load_best_model_at_end


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.loging_steps=3", "trainer.loging_steps: there is no such key; did you mean 'logging_steps'?"),
        ("trainer.learning_rate=3", "trainer.learning_rate: set optimization.lr instead"),
        ("trainer.num_train_epochs=3", "trainer.num_train_epochs: set trainer.epochs instead"),
        ("trainer.dataloader_drop_last=true", "trainer.dataloader_drop_last: leave it out"),
        ("trainer.hub_token=secret", "trainer.hub_token: leave it out, it would be saved with the run"),
        ("trainer.resume=maybe", "trainer.resume: wants auto or never, got 'maybe'"),
        ("trainer.report_to=no_such_tracker", "trainer.report_to: no_such_tracker is not installed"),
        ("trainer.resume_from_checkpoint=x", "trainer.resume_from_checkpoint: leave it out"),
        ("trainer.max_steps=many", "trainer.max_steps: wants int, got 'many'"),
        ("trainer.bf16=3", "trainer.bf16: wants bool, got 3"),
        ("trainer.epochs=soon", "trainer.epochs: wants float or int, got 'soon'"),
        (
            "trainer.eval_strategy=sometimes",
            "trainer: sometimes is not a valid IntervalStrategy, please select one of",
        ),
        ("dataset.batch_size=1", "dataset.batch_size: one pair has no negative to tell apart; set 2 or more"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(run_config: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        build_training_arguments(load_config(run_config, [override]))
    assert "\n" not in str(caught.value)
