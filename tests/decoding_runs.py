"""A tiny decoding run: 12 training and 6 val pairs, a tiny alignment, a tiny language model."""

from pathlib import Path
from typing import Any

import torch
import yaml

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor
from tests.conftest import write_pairs
from tests.language_models import save_tiny_language_model
from training.caching import cache_features
from training.decoding.build import (
    build_decoder,
    build_decoding_arguments,
    build_decoding_datasets,
    build_decoding_processor,
)
from training.decoding.config import load_decoding_config
from training.decoding.trainer import DecodingTrainer


def write_decoding_config(folder: Path, vision_dir: str, text_dir: str, **dataset: Any) -> Path:
    """The YAML of the run, and all that it names."""
    torch.manual_seed(0)
    sizes = {"projection_dim": 64, "mrl_dimensions": [32, 16]}
    EdgeGlassModel.from_vision_text_pretrained(vision_dir, text_dir, **sizes).save_pretrained(folder / "alignment")
    EdgeGlassProcessor.from_vision_text_pretrained(vision_dir, text_dir).save_pretrained(folder / "alignment")
    files = {"train_parquet": write_pairs(folder / "train.parquet", 12), "val_parquet": folder / "val.parquet"}
    write_pairs(files["val_parquet"], 6, first=12)
    config = {
        "dataset": {key: str(path) for key, path in files.items()}
        | {"batch_size": 4, "max_text_length": 32, "cache": "off", "prompt": "Say.", "cache_dir": f"{folder}/cache"}
        | dataset,
        "decoding": {
            "alignment": f"{folder}/alignment",
            "language_model": save_tiny_language_model(folder / "language"),
            "num_prefix_tokens": 4,
        },
        "optimization": {"lr": 0.01},
        "trainer": {"output_dir": f"{folder}/run", "epochs": 2, "logging_steps": 1, "use_cpu": True},
    }
    path = folder / "decoding.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def make_decoding_trainer(path: Path, *overrides: str) -> DecodingTrainer:
    """As run_decoding.py makes it."""
    config = load_decoding_config(path, overrides)
    args = build_decoding_arguments(config)
    torch.manual_seed(args.seed)
    model = build_decoder(config, args.seed)
    processor = build_decoding_processor(config, model)
    data = build_decoding_datasets(config, processor, args.seed)
    trainer = DecodingTrainer(
        model,
        args,
        processing_class=processor,
        train_dataset=data["train"],
        eval_dataset=data["val"],
        text_noise=config.dataset.text_noise,
        generation=config.generation,
        max_bad_fraction=config.dataset.max_bad_fraction,
    )
    cache_features(config.dataset, model.alignment, trainer, processor.alignment_processor, data)
    return trainer
