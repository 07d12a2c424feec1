"""The two towers as ONNX graphs: exported, compared with torch, quantised to int8."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from modeling_edgeglass import EdgeGlassModel, EdgeGlassProcessor, TextEncoder, VisionEncoder
from modeling_edgeglass.matryoshka import truncate_embeds
from training.batches import tokenize
from training.errors import ConfigError, printable

MAX_DIFFERENCE = 1e-4  # of a number of a unit vector, ONNX against torch; rounding alone makes about 1e-6

TOWERS = ("image", "text")
WEIGHTS = {"float32": "", "int8": "_int8"}  # and what the names of their files end in

_NUM_EXAMPLES = 5
_LONGEST_EXAMPLE = 512  # tokens; longer captions take their time and tell nothing new

# Axes whose size is free.
_AXES: dict[str, dict[int, str]] = {
    "pixel_values": {0: "batch"},
    "input_ids": {0: "batch", 1: "length"},
    "attention_mask": {0: "batch", 1: "length"},
}


class Graph(nn.Module):
    """An encoder as it is exported: to unit vectors of one size.

    The projection is cut rather than what it gives, so that the file need not hold what nobody reads: of the demo's
    vision tower 25 MB are left of 88 at size 512.

    Args:
        encoder: The tower.
        truncate_dim: Numbers kept of an embedding, before it is scaled to unit length; None keeps all.
    """

    output_name: str

    def __init__(self, encoder: VisionEncoder | TextEncoder, truncate_dim: int | None) -> None:
        super().__init__()
        self.encoder, self.truncate_dim = encoder, truncate_dim
        self.tower = f"{encoder.modality} tower {type(encoder.backbone).__name__}"
        self.weight = nn.Parameter(encoder.projection.weight.detach()[:truncate_dim])
        self.bias = nn.Parameter(encoder.projection.bias.detach()[:truncate_dim])

    def project(self, features: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Pool and project features (B, N, D) to unit vectors (B, truncate_dim)."""
        pooled = self.encoder.pool(features, attention_mask)
        return truncate_embeds(F.linear(pooled, self.weight, self.bias), None)

    def expected(self, **inputs: Tensor) -> Tensor:
        """What the encoder itself gives, cut (B, truncate_dim)."""
        return truncate_embeds(self.encoder(**inputs), self.truncate_dim)


class ImageGraph(Graph):
    """What becomes `image_encoder.onnx`."""

    encoder: VisionEncoder
    output_name = "image_embeds"

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed pictures (B, 3, S, S) as (B, truncate_dim)."""
        return self.project(self.encoder.features(pixel_values))


class TextGraph(Graph):
    """What becomes `text_encoder.onnx`."""

    encoder: TextEncoder
    output_name = "text_embeds"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed token ids (B, L) as (B, truncate_dim)."""
        return self.project(*self.encoder.features(input_ids, attention_mask))


def write_encoders(
    model: EdgeGlassModel, processor: EdgeGlassProcessor, truncate_dim: int | None, dataset: Any, folder: Path
) -> dict[str, Any]:
    """Write both encoders into `folder`, in float32 and int8, and compare the former with the model.

    Args:
        model: The alignment, in float32.
        processor: Its processor.
        truncate_dim: Numbers of an embedding; None keeps all.
        dataset: Pairs to compare with; None makes some up.
        folder: Where the files go.

    Returns:
        What a user needs to know of them.

    Raises:
        ConfigError: A tower cannot be exported, or its file gives other embeddings.
    """
    pictures, captions = examples(processor, dataset)
    differences = {}
    graphs = (ImageGraph(model.vision_encoder, truncate_dim), TextGraph(model.text_encoder, truncate_dim))
    batches = (picture_batches(pictures), text_batches(processor.tokenizer, captions))
    for tower, graph, inputs in tqdm([*zip(TOWERS, graphs, batches, strict=True)], desc="export", unit="encoder"):
        path = folder / f"{tower}_encoder.onnx"
        export_graph(graph, inputs[0], path)
        differences[tower] = largest_difference(graph, path, inputs)
        quantize(path, folder / f"{tower}_encoder_int8.onnx")
    image_processor, sizes = processor.image_processor, model.config.mrl_dimensions
    return {
        "dimension": truncate_dim or model.config.projection_dim,
        "mrl_dimensions": [size for size in sizes if truncate_dim is None or size < truncate_dim],
        "image": {
            "size": image_processor.crop_size["height"],
            "resample": int(image_processor.resample),
            "mean": list(image_processor.image_mean),
            "std": list(image_processor.image_std),
        },
        "text": {"max_length": processor.tokenizer.model_max_length},
        "largest_difference_from_torch": differences,
        "bytes": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }


def examples(processor: EdgeGlassProcessor, dataset: Any) -> tuple[Tensor, list[str]]:
    """Five pictures (5, 3, S, S) and captions: of good rows of `dataset`, and noise where there are not as many."""
    rows = (dataset[i] for i in range(0 if dataset is None else len(dataset)))
    items = list(islice((row for row in rows if row["is_valid"]), _NUM_EXAMPLES))
    side = processor.image_processor.crop_size["height"]
    noise = torch.randn(_NUM_EXAMPLES, 3, side, side, generator=torch.Generator().manual_seed(0))
    pictures = [*(item["image"] for item in items), *noise][:_NUM_EXAMPLES]
    made_up = ["a dog", "", "two red boats on a lake", "3 + 4 = 7, is it not?", "a very small house far away"]
    return torch.stack(pictures), [*(item["text"] for item in items), *made_up][:_NUM_EXAMPLES]


def picture_batches(pictures: Tensor) -> list[dict[str, Tensor]]:
    """Batches of several sizes; the first is the one to trace."""
    return [{"pixel_values": pictures[:size]} for size in (3, 1, len(pictures))]


def text_batches(tokenizer: Any, captions: list[str]) -> list[dict[str, Tensor]]:
    """Batches of several sizes and lengths, up to the longest that the tokenizer makes; the first is for tracing."""
    longest = min(tokenizer.model_max_length, _LONGEST_EXAMPLE)

    def cut(texts: list[str], length: int) -> dict[str, Tensor]:
        return {name: ids[:, :length] for name, ids in tokenize(tokenizer, texts).items()}

    # A length of one, and one that is the tower's limit, would be taken as fixed.
    traced = cut(["two dots and a box", "a dot", "a box"], max(2, longest // 2))
    long = "a dot " * longest
    return [
        traced,
        cut(captions, longest),
        cut(captions[:1], 3),
        cut([long, captions[0]], longest),
        cut([long], longest),
    ]


@torch.no_grad()
def export_graph(graph: Graph, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Write `graph` as an ONNX file in which batch and text length are free.

    Args:
        graph: In eval mode, in float32.
        inputs: Of a batch of two or more and a length that is no limit: sizes of one are taken as fixed.
        path: The file; weights beyond 2 GB go into `path`.data beside it.

    Raises:
        ConfigError: torch cannot export the tower.
    """
    try:
        with quiet():
            # The older exporter, which traces one example, bakes the sizes that Python code asks for into the graph.
            program = torch.onnx.export(
                graph,
                kwargs=dict(inputs),
                dynamo=True,
                input_names=list(inputs),
                output_names=[graph.output_name],
                dynamic_shapes={name: _AXES[name] for name in inputs},
                verbose=False,
            )
            assert program is not None
            _clean(program.model)
            program.save(path)
    except torch.onnx.OnnxExporterError as error:
        raise ConfigError(f"{graph.tower} cannot be exported to ONNX: {_reason(error)}") from error


def _clean(model: Any) -> None:
    """Rewrite what onnxruntime gets wrong, and drop the stack traces, which name folders of this machine.

    onnxruntime 1.32 fuses a transposition into a product with a vector, and then multiplies the wrong axis: the
    pooling of a feature map's tokens came out another vector. As an einsum the product is left alone.
    """
    import onnx_ir

    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
        if node.op_type == "MatMul" and node.inputs[1].shape is not None and len(node.inputs[1].shape) == 1:
            node.op_type = "Einsum"
            node.attributes["equation"] = onnx_ir.AttrString("equation", "...d,d->...")


def quantize(source: Path, target: Path) -> None:
    """Write an exported file with its weight matrices and embedding tables in int8.

    Activations are scaled as they come, a batch by one scale: its padding and its other samples move an embedding a
    little. Measured on the demo, val: a scale per channel of a weight matrix in place of one for all raises the cosine
    of a text's int8 and float32 embedding from 0.95 to 0.99. Convolutions stay as they are: in int8 they lose a third
    to two thirds of the image-to-text R@1, and take two to ten times as long. Weights are unsigned: of signed ones
    onnxruntime's guide says that products saturate where a CPU has AVX2 but no VNNI, and recall measured on another
    CPU would not hold there.

    Args:
        source: What `export_graph` wrote.
        target: The file.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
            use_external_data_format=source.with_name(f"{source.name}.data").exists(),
        )


def largest_difference(graph: Graph, path: Path, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """The largest difference of a number between torch and onnxruntime, over some batches.

    Raises:
        ConfigError: It is above `MAX_DIFFERENCE` or no number, or onnxruntime cannot run the file.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    try:
        session = open_session(path)
        with torch.no_grad():
            differences = [(graph.expected(**batch) - run_session(session, batch)).abs().max() for batch in batches]
    except (ort.Fail, ort.InvalidArgument, ort.InvalidGraph, ort.NotImplemented, ort.RuntimeException) as error:
        raise ConfigError(f"{graph.tower}: onnxruntime cannot run its ONNX file: {_reason(error)}") from error
    largest = float(torch.stack(differences).max())
    if not largest <= MAX_DIFFERENCE:
        raise ConfigError(
            f"{graph.tower}: its ONNX file gives other embeddings than torch, by up to {largest:.1e}, where "
            f"{MAX_DIFFERENCE:.0e} are allowed; another version of onnxruntime or torch may help"
        )
    return largest


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a session makes of inputs: embeddings (B, D)."""
    wanted = [value.name for value in session.get_inputs()]
    (embeds,) = session.run(None, {name: inputs[name].numpy() for name in wanted})
    return torch.from_numpy(np.asarray(embeds))


@contextmanager
def quiet() -> Iterator[None]:
    """Within, nothing below an error is logged, and nobody warns: exporters tell of their own workings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: an exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 200)
