import re
from pathlib import Path

import pytest

from tests.runs import make_trainer
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


def test_accumulation_is_one_warning_that_names_the_way_to_large_batches(run_config: Path, caplog):
    def warnings(*overrides: str) -> list[str]:
        caplog.clear()
        build_training_arguments(load_config(run_config, overrides))
        return [record.message for record in caplog.records if "tower_chunk_size" in record.message]

    assert not warnings()
    assert len(warnings("trainer.gradient_accumulation_steps=2")) == 1
    assert not warnings("trainer.gradient_accumulation_steps=2", "optimization.tower_chunk_size=2")


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
        ("trainer.eval_strategy=sometimes", "trainer.eval_strategy: wants no, steps, epoch, got 'sometimes'"),
        ("trainer.lr_scheduler_type=cosin", "got 'cosin'; did you mean 'cosine'?"),
        ("trainer.lr_scheduler_kwargs=3", "trainer.lr_scheduler_kwargs: wants dict or str, got 3"),
        ("trainer.report_to=[3]", "trainer.report_to: wants list[str] or str, got [3]"),
        ("trainer.accelerator_config={split_batchs: true}", "unexpected keyword argument 'split_batchs'"),
        ("trainer.seed=-1", "trainer.seed: must be in 0..2^32-1, got -1"),
        ("trainer.gradient_accumulation_steps=0", "trainer.gradient_accumulation_steps: must be 1 or more, got 0"),
        ("trainer.dataloader_num_workers=-1", "trainer.dataloader_num_workers: must be 0 or more, got -1"),
        ("trainer.epochs=0", "trainer.epochs: must be above 0, got 0"),
        ("trainer.epochs=-1", "trainer.epochs: must be above 0, got -1"),
        ("trainer.metric_for_best_model=i2t_r10@23", "there is no metric 'i2t_r10@23'; did you mean 'i2t_r10@32'?"),
        ("trainer.metric_for_best_model=foo", "there is no metric 'foo'; there are loss, loss_clip, loss_mrl"),
        ("dataset.batch_size=1", "dataset.batch_size: one pair has no negative to tell apart; set 2 or more"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(run_config: Path, override: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        build_training_arguments(load_config(run_config, [override]))
    assert "\n" not in str(caught.value)


def test_a_wrong_key_of_the_file_names_the_file(run_config: Path):
    run_config.write_text(run_config.read_text() + "  loging_steps: 3\n")
    with pytest.raises(
        ConfigError, match=r"run\.yaml: trainer\.loging_steps: there is no such key; did you mean 'log"
    ):
        build_training_arguments(load_config(run_config))


def test_lists_and_dicts_pass_too(run_config: Path):
    overrides = [
        "trainer.report_to=[none]",
        "trainer.label_names=[a]",
        "trainer.include_for_metrics=[inputs]",
        "trainer.activation_checkpointing_kwargs={use_reentrant: false}",
        "trainer.accelerator_config={split_batches: true}",
        "trainer.fsdp_config={min_num_params: 3}",
        "trainer.lr_scheduler_kwargs={num_cycles: 0.5}",
    ]
    args = build_training_arguments(load_config(run_config, overrides))
    assert args.label_names == ["a"]
    assert args.include_for_metrics == ["inputs"]
    assert type(args.activation_checkpointing_kwargs) is dict
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert args.accelerator_config.split_batches is True
    assert args.lr_scheduler_kwargs == {"num_cycles": 0.5}


@pytest.mark.parametrize(
    ("metric", "greater_is_better"),
    [("i2t_r1", True), ("eval_t2i_ndcg@16", True), ("loss_clip", False), ("i2t_medr@32", False), ("bad_rows", False)],
)
def test_the_best_model_is_chosen_by_a_metric_that_there_is(run_config: Path, metric: str, greater_is_better: bool):
    args = build_training_arguments(load_config(run_config, [f"trainer.metric_for_best_model={metric}"]))
    assert args.metric_for_best_model == metric
    assert args.greater_is_better is greater_is_better


def test_every_metric_of_an_evaluation_can_choose_the_best_model(run_config: Path):
    metrics = make_trainer(run_config).evaluate()
    for name in metrics:
        if not name.endswith(("epoch", "runtime", "_time", "per_second")):
            build_training_arguments(load_config(run_config, [f"trainer.metric_for_best_model={name}"]))


def test_steps_may_stand_for_epochs_and_no_workers_are_not_kept(run_config: Path):
    assert (
        build_training_arguments(load_config(run_config, ["trainer.epochs=0", "trainer.max_steps=3"])).max_steps == 3
    )
    keep = "trainer.dataloader_persistent_workers=true"
    for num_workers in (0, 2):
        config = load_config(run_config, [keep, f"trainer.dataloader_num_workers={num_workers}"])
        assert build_training_arguments(config).dataloader_persistent_workers is (num_workers > 0)
