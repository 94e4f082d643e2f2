"""A checkpoint file becomes a model: tensors stay memory-mapped until they are cast or moved."""

import math
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..config import L2PConfig, block_numbers
from ..model import L2PTransformer
from .header import SHARD_NAME, CheckpointError, Entry, refuse_zeros
from .layout import FLOATS, UNSCALED, Layout, read_layout
from .quantization import Int8Linear, dequantize, kernel

KEPT_IN_8_BITS = "int8_tensorwise"  # other formats are multiplied out


def load_model(
    path: str | Path | Layout,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    convrot_groupsize: int | None = None,
    progress: bool = False,
) -> L2PTransformer:
    """Return the model of a checkpoint, ready to generate.

    path: a file with any known tensor names, an index or a folder of shards, or the layout read
    from one.

    dtype: what all weights become, save INT8 ones, which stay INT8. Weights that already are of
    that dtype stay in the memory-mapped file on a CPU. convrot_groupsize: see `read_layout`, where
    a layout has it. progress: show a bar. Raises CheckpointError where the file is not a whole,
    finite L2P model; its message says what it is."""
    layout = path if isinstance(path, Layout) else read_layout(path, convrot_groupsize)
    check(layout)
    with torch.device("meta"):
        model = L2PTransformer(layout.config)
    tensors: dict[str, Tensor] = {}
    with ExitStack() as opened:
        try:
            readers = {
                file: opened.enter_context(safe_open(file, framework="pt")) for file in layout.files
            }
        except SafetensorError as error:
            raise CheckpointError(
                f"{layout.path.name} can't be opened: {error}. Get the file again"
            ) from None

        def read(
            entry: Entry, third: int | None = None, dtype: torch.dtype | None = None
        ) -> Tensor:
            tensor = readers[entry.file].get_tensor(entry.key)
            if third is not None and tensor.dim():
                tensor = tensor.chunk(3)[third]
            return tensor.to(device, dtype)

        # Key and weights of the last that were multiplied out: packed q, k and v are read once.
        multiplied_out: tuple[str, Tensor] | None = None
        for name, source in tqdm(
            layout.tensors.items(),
            desc=f"loading {layout.path.name}",
            unit="tensor",
            disable=not progress,
        ):
            layer = name.rpartition(".")[0]
            if source.format is None:
                tensors[name] = read(source.entry, source.third, dtype)
            elif source.format == KEPT_IN_8_BITS and isinstance(
                model.get_submodule(layer), nn.Linear
            ):
                kernel("int8_linear")  # says so now where it is not installed
                shared = source.scale.count == 1
                scale = read(source.scale, None if shared else source.third, torch.float32).reshape(
                    1 if shared else (-1, 1)
                )
                tensors[name] = read(source.entry, source.third)
                tensors[f"{layer}.weight_scale"] = scale
                model.set_submodule(
                    layer,
                    Int8Linear(
                        tensors[name],
                        scale,
                        model.get_submodule(layer).bias,
                        source.convrot_groupsize,
                    ),
                )
                _refuse_nan(layout, source.scale.key, scale)
            else:
                if multiplied_out is None or multiplied_out[0] != source.entry.key:
                    multiplied_out = (
                        source.entry.key,
                        dequantize(
                            source.format,
                            read(source.entry),
                            read(source.scale),
                            source.scale_2 and read(source.scale_2),
                            source.convrot_groupsize,
                            dtype,
                        ),
                    )
                tensors[name] = (
                    multiplied_out[1]
                    if source.third is None
                    else multiplied_out[1].chunk(3)[source.third]
                )
            _refuse_nan(layout, source.entry.key, tensors[name])
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def check(layout: Layout) -> None:
    """Raise CheckpointError, saying what the file is and what to do, unless it is a whole L2P
    model."""
    name = layout.path.name
    if len(layout.files) == 1 and (shard := SHARD_NAME.search(name)) and int(shard[1]) > 1:
        raise CheckpointError(
            f"{name} is one of {int(shard[1])} shards. Give the folder that holds them all, or"
            " their index"
        )
    if layout.kind == "latent":
        raise CheckpointError(
            f"{name} is a latent Z-Image, which needs a VAE. "
            "Convert it to an L2P pixel initialisation first, l2p convert, and train that"
        )
    if layout.kind == "lora":
        raise CheckpointError(
            f"{name} is a LoRA, which changes a model. Give the L2P model itself here"
        )
    if layout.kind == "text encoder":
        raise CheckpointError(
            f"{name} is a text encoder. Give it as the text encoder, and an L2P model here"
        )
    if layout.kind == "unknown":
        first = next(iter(layout.entries), None)
        raise CheckpointError(
            f"{name} is not an L2P model: "
            + (
                f"its {len(layout.entries)} tensors (first: {first}) are another model's"
                if first
                else "it holds no tensors"
            )
            + ". Give an L2P checkpoint, such as model-1k-merge"
        )
    if layout.kind == "part":
        layers = missing_layers(layout)
        raise CheckpointError(
            f"{name} holds {len(layout.tensors)} tensors but lacks "
            + (f"main layers {layers}" if layers else "parts of the transformer")
            + ": it is a trained part. Merge it with the pixel initialisation it was trained from"
            " first: l2p merge"
        )
    expected = expected_shapes(layout.config)
    found = {key: source.shape for key, source in layout.tensors.items()}
    if missing := [key for key in expected if key not in found]:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the model's {len(expected)} tensors (first:"
            f" {missing[0]}). The file is damaged or not whole. Get it again"
        )
    if extra := [found_key for found_key in (*found, *layout.unused) if found_key not in expected]:
        raise CheckpointError(
            f"{name} has {len(extra)} tensors that an L2P model of its size lacks (first:"
            f" {extra[0]}). It is another kind of model, or was made by a program this one does not"
            " know"
        )
    if misshapen := [key for key in expected if found[key] != expected[key]]:
        key = misshapen[0]
        raise CheckpointError(
            f"{name}: {len(misshapen)} tensors have a shape that does not fit (first: {key} is "
            f"{found[key]}, expected {expected[key]}). The file mixes models or is damaged"
        )
    for file in layout.stamps:  # none for tensors in memory
        refuse_zeros(file)
    for source in layout.tensors.values():
        if source.format is None and source.entry.dtype not in (*FLOATS, *UNSCALED):
            raise CheckpointError(
                f"{name}: {source.entry.key} is {source.entry.dtype} without a weight_scale;"
                " expected floating point, or INT8 with its scale. The file is damaged"
            )


def bytes_in_memory(layout: Layout, dtype: torch.dtype) -> dict[str, int]:
    """What each tensor takes once it is loaded, by its published name."""
    return {
        name: math.prod(source.shape) * (1 if source.format == KEPT_IN_8_BITS else dtype.itemsize)
        for name, source in layout.tensors.items()
    }


def expected_shapes(config: L2PConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model. Only one block of each stack is built: a file may
    claim thousands."""
    depths = {
        "layers": config.n_layers,
        "noise_refiner": config.n_refiner_layers,
        "context_refiner": config.n_refiner_layers,
    }
    with torch.device("meta"):
        shallow = L2PTransformer(replace(config, n_layers=1, n_refiner_layers=1)).state_dict()
    expected = {}
    for stack, tensors in groupby(shallow.items(), key=lambda item: item[0].partition(".")[0]):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        if stack not in depths:
            expected.update(shapes)
        for number in range(depths.get(stack, 0)):
            expected.update(
                {name.replace(".0.", f".{number}.", 1): shape for name, shape in shapes.items()}
            )
    return expected


def missing_layers(layout: Layout) -> str:
    """ "5..24": the gap in the main layers that a trained part leaves. Empty where there is
    none."""
    depths = block_numbers(layout.tensors)
    absent = sorted(set(range(max(depths, default=-1) + 1)) - depths)
    return f"{absent[0]}..{absent[-1]}" if absent else ""


def _refuse_nan(layout: Layout, key: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
        raise CheckpointError(
            f"{layout.path.name}: {key} holds NaN or infinite numbers"
            + (" once cast to float16" if tensor.dtype == torch.float16 else "")
            + ". The file is damaged, or its training diverged"
        )
