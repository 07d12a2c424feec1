"""Train a language model to put the embeddings of an alignment into words.

    accelerate launch run_decoding.py --config configs/qwen_decoding.yaml \\
        decoding.alignment=outputs/pixmo/model decoding.language_model=Qwen/Qwen2.5-0.5B-Instruct

The alignment comes from run_alignment.py and stays as it is. A bridge makes soft tokens of an embedding, which stand
in front of the prompt; the language model stays frozen, or gets low-rank adapters, or trains as a whole. Any key of
the config can be set behind it as key=value. The output directory gets config.yaml as resolved, checkpoints, the best
bridge with its processor in model/, val pictures with what was said of them, and final_metrics.json.

A run that was cut off goes on from its newest whole checkpoint when the same command is given again, and ends with
the same bits. SIGTERM or Ctrl-C: it saves after the step, leaves preempted.json and exits with status 75.
"""

from training.decoding.config import DecodingConfig, load_decoding_config
from training.run import run_command, train_to_the_end
from training.signals import SignalListener

EXAMPLES = "configs/qwen_decoding.yaml", "decoding.language_model=Qwen/Qwen2.5-0.5B-Instruct"


def main() -> None:
    run_command(__doc__, EXAMPLES, load_decoding_config, decode)


def decode(config: DecodingConfig, signals: SignalListener) -> int:
    """Train, evaluate, describe, save; returns the exit status of the process."""
    # torch and transformers take seconds to import; neither --help nor a typo in the config waits for them.
    from transformers import set_seed

    from training.caching import cache_features
    from training.cpu import prepare_cpu
    from training.decoding.build import (
        build_decoder,
        build_decoding_arguments,
        build_decoding_datasets,
        build_decoding_processor,
        check_ends_can_be_pushed,
        frozen_decoder_weights,
        save_decoder,
    )
    from training.decoding.scores import check_scorers
    from training.decoding.trainer import DecodingTrainer
    from training.identity import run_identity
    from training.results import checkpoint_to_resume, save_model
    from training.tables import description_table

    args = build_decoding_arguments(config)
    prepare_cpu(args)
    set_seed(args.seed)
    if config.generation.num_scored:
        check_scorers()

    model = build_decoder(config, args.seed)
    check_ends_can_be_pushed(config, model)
    processor = build_decoding_processor(config, model)
    with args.main_process_first(desc="convert the parquet files"):
        datasets = build_decoding_datasets(config, processor, args.seed)
    identity = run_identity(config, frozen_decoder_weights(model), datasets, args.world_size)
    checkpoint = checkpoint_to_resume(config.trainer, identity)

    trainer = DecodingTrainer(
        model,
        args,
        processing_class=processor,
        train_dataset=datasets["train"],
        eval_dataset=datasets["val"],
        text_noise=config.dataset.text_noise,
        generation=config.generation,
        early_stopping_patience=config.optimization.early_stopping_patience,
        identity=identity,
        on_nan=config.optimization.on_nan,
        max_bad_fraction=config.dataset.max_bad_fraction,
        signals=signals,
    )

    def prepare() -> None:
        alignment, pictures = model.alignment, processor.alignment_processor
        cache_features(config.dataset, alignment, trainer, pictures, datasets, signals)
        trainer.score_untrained(is_resumed=checkpoint is not None)

    return train_to_the_end(
        config,
        trainer,
        checkpoint,
        prepare=prepare,
        save=lambda output_dir: save_model(lambda folder: save_decoder(model, folder), processor, output_dir),
        describe=lambda metrics: description_table(metrics, model.config.sizes),
        full_dimension=model.config.sizes[0],
    )


if __name__ == "__main__":
    main()
