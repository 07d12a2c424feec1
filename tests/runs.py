"""A trainer in this process, as run_alignment.py makes it."""

from pathlib import Path

import torch

from training.arguments import build_training_arguments
from training.build import build_datasets, build_model, build_processor, frozen_weights
from training.caching import cache_features
from training.config import load_config
from training.identity import run_identity
from training.initialization import initialize
from training.trainer import AlignmentTrainer


def make_trainer(run_config: Path, *overrides: str, visualize: bool = False) -> AlignmentTrainer:
    config = load_config(run_config, overrides)
    args = build_training_arguments(config)
    torch.manual_seed(args.seed)
    model = build_model(config, args.seed)
    processor = build_processor(config, model)
    data = build_datasets(config, processor, args.seed)
    trainer = AlignmentTrainer(
        model,
        args,
        processing_class=processor,
        train_dataset=data["train"],
        eval_dataset=data["val"],
        early_stopping_patience=config.optimization.early_stopping_patience,
        identity=run_identity(config, frozen_weights(model), data, args.world_size),
        on_nan=config.optimization.on_nan,
        max_bad_fraction=config.dataset.max_bad_fraction,
        tower_chunk_size=config.optimization.tower_chunk_size,
        visualize=visualize,
    )
    cache_features(config.dataset, model, trainer, processor, data)
    initialize(config, trainer)
    return trainer
