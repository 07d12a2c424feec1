"""Align a vision and a text tower on picture-caption pairs.

    accelerate launch run_alignment.py --config configs/demo.yaml trainer.epochs=3

Any key of the config can be set behind it as key=value. The output directory gets config.yaml as resolved,
checkpoints, the best model with its processor in model/, and final_metrics.json.

With dataset.cache=disk frozen towers run once, and what they give is kept for all epochs and further runs.
With optimization.init=spectral training starts from the closed form, and with trainer.epochs=0 that is all.

A run that was cut off goes on from its newest whole checkpoint when the same command is given again, and ends with
the same bits. SIGTERM or Ctrl-C: it saves after the step, leaves preempted.json and exits with status 75.
"""

import argparse
import errno
import os
import re
import sys
from datetime import UTC, datetime

from training.config import AlignmentConfig, load_config
from training.config_files import save_config
from training.errors import UserError
from training.signals import Interrupted, SignalListener


def main() -> None:
    options = parse_options()
    # Tokenizers in forked workers would each warn that they no longer run in parallel, as is right for workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signals = SignalListener()
    try:
        with signals.listening():
            sys.exit(align(load_config(options.config, options.overrides), signals))
    except UserError as error:
        sys.exit(last_words(error))
    except OSError as error:  # of a figure or a log, wherever it is written
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(f"error: the disk is full ({error}): make room and start the same command again")


def last_words(error: UserError) -> str | int:
    """What a rank says before it ends: of errors that all ranks have, one of each machine speaks."""
    rank, local_rank, world_size = (os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if not error.of_one_rank and (local_rank or "0") != "0":
        return 1
    speaker = f"error (rank {rank})" if error.of_one_rank and (world_size or "1") != "1" else "error"
    # From a loader's worker the message comes with a traceback in front of it.
    message = re.sub(r"\ACaught .*^[\w.]+Error: ", "", str(error), flags=re.DOTALL | re.MULTILINE)
    return f"{speaker}: {' '.join(message.split())}"


def align(config: AlignmentConfig, signals: SignalListener) -> int:
    """Train, evaluate, save; returns the exit status of the process."""
    # torch and transformers take seconds to import; neither --help nor a typo in the config waits for them.
    from transformers import set_seed

    from training.arguments import build_training_arguments
    from training.build import build_datasets, build_model, build_processor
    from training.caching import cache_features
    from training.cpu import prepare_cpu
    from training.environment import describe_environment, save_environment
    from training.history import logged_names
    from training.identity import run_identity
    from training.initialization import initialize
    from training.results import (
        CONFIG,
        FINAL_METRICS,
        PREEMPTED_STATUS,
        checkpoint_to_resume,
        clear_marks,
        mark_preempted,
        save_metrics,
        save_model,
    )
    from training.tables import recall_table
    from training.trainer import AlignmentTrainer
    from training.visualization.report import write_report

    args = build_training_arguments(config)
    output_dir = str(args.output_dir)
    prepare_cpu(args)
    set_seed(args.seed)

    model = build_model(config, args.seed)
    processor = build_processor(config, model)
    with args.main_process_first(desc="convert the parquet files"):
        datasets = build_datasets(config, processor, args.seed)
    identity = run_identity(config, model, datasets, args.world_size)
    checkpoint = checkpoint_to_resume(config, identity)

    trainer = AlignmentTrainer(
        model,
        args,
        processing_class=processor,
        train_dataset=datasets["train"],
        eval_dataset=datasets["val"],
        early_stopping_patience=config.optimization.early_stopping_patience,
        identity=identity,
        on_nan=config.optimization.on_nan,
        max_bad_fraction=config.dataset.max_bad_fraction,
        tower_chunk_size=config.optimization.tower_chunk_size,
        signals=signals,
    )
    trainer.accelerator.wait_for_everyone()  # until every rank has looked into the directory
    if args.should_save:
        clear_marks(output_dir)
        save_config(config, f"{output_dir}/{CONFIG}")
        save_environment(describe_environment(datetime.now(UTC), args.world_size), output_dir)
    try:
        cache_features(config.dataset, model, trainer, processor, datasets, signals)
        if checkpoint is None:
            initialize(config, trainer)
    except Interrupted:
        if args.should_save:
            mark_preempted(output_dir, trainer.state.global_step)
        print("stopped by a signal before the first step; the same command goes on from what is kept")
        return PREEMPTED_STATUS
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = logged_names(trainer.evaluate_unless_preempted())
    if trainer.preempted:
        if args.should_save:
            mark_preempted(output_dir, trainer.state.global_step)
        print(f"stopped by a signal after step {trainer.state.global_step}; the same command goes on from there")
        return PREEMPTED_STATUS

    if args.should_save:
        save_model(model, processor, output_dir)
        save_metrics(metrics, f"{output_dir}/{FINAL_METRICS}")
        best, metric = trainer.loaded_best_step, str(args.metric_for_best_model).removeprefix("eval_")
        print("model of the last step" if best is None else f"model of step {best}, the best val/{metric}")
        print(recall_table(metrics, (model.config.projection_dim, *model.config.mrl_dimensions)))
        print(f"model: {output_dir}/model   metrics: {output_dir}/{FINAL_METRICS}")
    if trainer.is_world_process_zero():
        try:
            write_report(output_dir, model.config.projection_dim)
        except (UserError, OSError, ValueError) as error:
            print(f"report.html could not be written: {error}")
    trainer.accelerator.end_training()
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, such as configs/pixmo_alignment.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as optimization.lr=1e-3")
    return parser.parse_args()


if __name__ == "__main__":
    main()
