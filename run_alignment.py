"""Align a vision and a text tower on picture-caption pairs.

    accelerate launch run_alignment.py --config configs/demo.yaml trainer.epochs=3

Any key of the config can be set behind it as key=value. The output directory gets config.yaml as resolved,
checkpoints, the best model with its processor in model/, and final_metrics.json.

With dataset.cache=disk frozen towers run once, and what they give is kept for all epochs and further runs.
With optimization.init=spectral training starts from the closed form, and with trainer.epochs=0 that is all.

A run that was cut off goes on from its newest whole checkpoint when the same command is given again, and ends with
the same bits. SIGTERM or Ctrl-C: it saves after the step, leaves preempted.json and exits with status 75.
"""

from training.config import AlignmentConfig, load_config
from training.run import run_command, train_to_the_end
from training.signals import SignalListener


def main() -> None:
    run_command(__doc__, ("configs/pixmo_alignment.yaml", "optimization.lr=1e-3"), load_config, align)


def align(config: AlignmentConfig, signals: SignalListener) -> int:
    """Train, evaluate, save; returns the exit status of the process."""
    # torch and transformers take seconds to import; neither --help nor a typo in the config waits for them.
    from transformers import set_seed

    from training.arguments import build_training_arguments
    from training.build import build_datasets, build_model, build_processor, frozen_weights, save_alignment
    from training.caching import cache_features
    from training.cpu import prepare_cpu
    from training.identity import run_identity
    from training.initialization import initialize
    from training.results import checkpoint_to_resume, save_model
    from training.tables import recall_table
    from training.trainer import AlignmentTrainer

    args = build_training_arguments(config)
    prepare_cpu(args)
    set_seed(args.seed)

    model = build_model(config, args.seed)
    processor = build_processor(config, model)
    with args.main_process_first(desc="convert the parquet files"):
        datasets = build_datasets(config, processor, args.seed)
    identity = run_identity(config, frozen_weights(model), datasets, args.world_size)
    checkpoint = checkpoint_to_resume(config.trainer, identity)

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

    def prepare() -> None:
        cache_features(config.dataset, model, trainer, processor, datasets, signals)
        if checkpoint is None:
            initialize(config, trainer)

    full_dimension = model.config.projection_dim
    return train_to_the_end(
        config,
        trainer,
        checkpoint,
        prepare=prepare,
        save=lambda output_dir: save_model(lambda folder: save_alignment(model, folder), processor, output_dir),
        describe=lambda metrics: recall_table(metrics, (full_dimension, *model.config.mrl_dimensions)),
        full_dimension=full_dimension,
    )


if __name__ == "__main__":
    main()
