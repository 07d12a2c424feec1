"""What makes a saved alignment a model of sentence-transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

import modeling_edgeglass

_CODE = "sentence_transformers_edgeglass"

# Files that sentence-transformers looks for, as it writes them itself.
_FILES: dict[str, Any] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": f"{_CODE}.EdgeGlassTransformer"}],
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "get_text_features", "method_output_name": None},
            "image": {"method": "get_image_features", "method_output_name": None},
        },
        "module_output_name": "sentence_embedding",
    },
}


def write_sentence_transformers_files(folder: Path) -> None:
    """Make `SentenceTransformer(folder, trust_remote_code=True)` work where an alignment and its processor lie.

    Needs no sentence-transformers.
    """
    for name, content in _FILES.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.copyfile(Path(modeling_edgeglass.__file__).with_name(f"{_CODE}.py"), folder / f"{_CODE}.py")
