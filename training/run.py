"""What the commands that train share: the command line, a session up to the saved model, last words."""

import argparse
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from training.errors import ConfigError, UserError
from training.signals import Interrupted, SignalListener

_SETTLING = 0.2  # seconds; a thread that waits for the interpreter takes microseconds


def run_command(
    description: str,
    examples: tuple[str, str],
    load: Callable[[str, Iterable[str]], Any],
    train: Callable[[Any, SignalListener], int],
) -> NoReturn:
    """Read the command line and the config, train, and end the process with a status.

    Args:
        description: What `--help` says.
        examples: Of a config file, and of an override.
        load: Makes a config of a path and overrides.
        train: Trains as the config says, heeds signals, and returns the status.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help=f"YAML file, such as {examples[0]}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"such as {examples[1]}")
    options = parser.parse_args()
    # Tokenizers in forked workers would each warn that they no longer run in parallel, as is right for workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    signals = SignalListener()
    try:
        with signals.listening():
            sys.exit(train(load(options.config, options.overrides), signals))
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


def train_to_the_end(
    config: Any,
    trainer: Any,
    checkpoint: Path | None,
    *,
    prepare: Callable[[], None],
    save: Callable[[str], None],
    describe: Callable[[Mapping[str, float]], str],
    full_dimension: int,
) -> int:
    """A session of a run: what comes before the first step, training, evaluation of the best model, and the files.

    The metrics are written last: where they are, the run is finished.

    Args:
        config: The run's.
        trainer: A `PairsTrainer`.
        checkpoint: What it goes on from.
        prepare: Called before the first step of every session; it may raise Interrupted.
        save: Writes the model into an output directory.
        describe: The metrics in words, for the terminal.
        full_dimension: Numbers of the full embedding.

    Returns:
        The status of the process: 0, or `PREEMPTED_STATUS` where a signal came.
    """
    from training.config_files import save_config
    from training.environment import describe_environment, save_environment
    from training.history import logged_names
    from training.push import check_hub, push, repository_of
    from training.results import (
        CONFIG,
        FINAL_METRICS,
        PREEMPTED_STATUS,
        clear_marks,
        mark_preempted,
        save_metrics,
    )
    from training.visualization.report import write_report

    args = trainer.args
    output_dir = str(args.output_dir)

    def stopped(when: str) -> int:
        if args.should_save:
            mark_preempted(output_dir, trainer.state.global_step)
        print(f"stopped by a signal {when}")
        leave(trainer)
        return PREEMPTED_STATUS

    repo_id, private = repository_of(config.trainer)
    if repo_id:
        check_together(partial(check_hub, repo_id, private), trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()  # until every rank has looked into the directory
    if args.should_save:
        clear_marks(output_dir)
        save_config(config, f"{output_dir}/{CONFIG}")
        save_environment(describe_environment(datetime.now(UTC), args.world_size), output_dir)
    try:
        prepare()
    except Interrupted:
        return stopped("before the first step; the same command goes on from what is kept")
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = logged_names(trainer.evaluate_unless_preempted())
    if trainer.preempted:
        return stopped(f"after step {trainer.state.global_step}; the same command goes on from there")
    if args.should_save:
        save(output_dir)
        save_metrics(metrics, f"{output_dir}/{FINAL_METRICS}")
        best, metric = trainer.loaded_best_step, str(args.metric_for_best_model).removeprefix("eval_")
        print("model of the last step" if best is None else f"model of step {best}, the best val/{metric}")
        print(describe(metrics))
        print(f"model: {output_dir}/model   metrics: {output_dir}/{FINAL_METRICS}")
    if trainer.is_world_process_zero():
        try:
            write_report(output_dir, full_dimension)
        except (UserError, OSError, ValueError) as error:
            print(f"report.html could not be written: {error}")
    leave(trainer)
    if repo_id and args.should_save:
        try:
            print(f"pushed: {push(Path(output_dir), repo_id, private=private)}")
        except UserError as error:
            print(f"error: not pushed: {error}\npython -m training.push {output_dir} {repo_id} tries again")
            return 1
    return 0


def check_together(check: Callable[[], None], is_main: bool) -> None:
    """Have the main process find something out, and all processes hear it.

    Raises:
        ConfigError: In all of them, what `check` raised in one.
    """
    from accelerate.utils import broadcast_object_list

    refusal: list[str | None] = [None]
    if is_main:
        try:
            check()
        except ConfigError as error:
            refusal[0] = str(error)
    broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise ConfigError(refusal[0])


def leave(trainer: Any) -> None:
    """Leave the group of processes, the last thing that a process does.

    A thread of gloo lets go of the tensors of a collective a little after it, and wants the interpreter for that. If
    the interpreter has begun to end by then, the thread ends the process with an abort ("terminate called without an
    active exception").
    """
    trainer.accelerator.end_training()
    if trainer.args.world_size > 1:
        time.sleep(_SETTLING)
