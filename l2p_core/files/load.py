"""A checkpoint file becomes a model: tensors stay memory-mapped until they are cast or moved."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ..config import PixelConfig, block_numbers
from ..model import L2PTransformer
from .fp8 import MULTIPLE, Fp8Linear
from .header import SHARD_NAME, CheckpointError, Entry, reject_zeros
from .layout import FLOATS, UNSCALED, Layout, Source, read_layout
from .quantization import FP8_DTYPES, Int8Linear, dequantize, kernel

In = TypeVar("In")
Out = TypeVar("Out")

READERS = 4  # threads: more than a disk feeds, and each holds what it casts
INT8, E4M3 = "int8_tensorwise", "float8_e4m3fn"  # formats that may stay 8 bits


def load_model(
    path: str | Path | Layout,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    convrot_groupsize: int | None = None,
    progress: bool = False,
    fp8: bool = False,
) -> L2PTransformer:
    """Return the model of a checkpoint, ready to generate.

    path: a file with any known tensor names, an index or a folder of shards, or the layout read
    from one.

    dtype: what all weights become, save INT8 ones, which stay INT8. Weights that already are of
    that dtype stay in the memory-mapped file on a CPU. convrot_groupsize: see `read_layout`, where
    a layout has it. progress: show a bar. fp8: keep FP8 weights and multiply in FP8, which the
    device must support: see `multiplies_fp8`. Raises CheckpointError where the file is not a whole,
    finite L2P model; its message says what it is."""
    layout = path if isinstance(path, Layout) else read_layout(path, convrot_groupsize)
    check(layout)
    model = layout.config.build()
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
        device = torch.empty(0, device=device).device  # "cuda" may be another one in a thread
        reader = Reader(layout, readers, model, device, dtype, fp8)
        # packed q, k and v are one group: their weight is read, and dequantized, once
        groups = [
            dict(group)
            for _, group in groupby(layout.tensors.items(), key=lambda item: item[1].entry.key)
        ]
        progress_bar = opened.enter_context(
            tqdm(
                total=len(layout.tensors),
                desc=f"loading {layout.path.name}",
                unit="tensor",
                disable=not progress,
            )
        )
        for group, loaded in zip(groups, opened.enter_context(on_all_cores(reader.load, groups))):
            tensors |= loaded
            progress_bar.update(len(group))
    for name, source in layout.tensors.items():
        layer = name.rpartition(".")[0]
        if f"{layer}.weight_scale" in tensors and name == f"{layer}.weight":
            bias = model.get_submodule(layer).bias
            given = tensors[name], tensors[f"{layer}.weight_scale"], bias
            linear = (
                Fp8Linear(*given)
                if source.format == E4M3
                else Int8Linear(*given, source.convrot_groupsize)
            )
            model.set_submodule(layer, linear)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


class Reader:
    """Reads a checkpoint's tensors, casts and checks them. Several threads may use it."""

    def __init__(
        self,
        layout: Layout,
        readers: Mapping[Path, safe_open],
        model: L2PTransformer,
        device: torch.device,
        dtype: torch.dtype,
        fp8: bool,
    ):
        self.layout, self.readers, self.model = layout, readers, model
        self.device, self.dtype, self.fp8 = device, dtype, fp8

    def load(self, group: Mapping[str, Source]) -> dict[str, Tensor]:
        """Return the tensors that one of the file's tensors becomes, by their published names: one,
        or packed q, k and v. Scales of INT8 weights are beside them. Raises CheckpointError."""
        loaded: dict[str, Tensor] = {}
        dequantized: Tensor | None = None
        for name, source in group.items():
            layer = name.rpartition(".")[0]
            if source.format is None:
                loaded[name] = self.read(source.entry, source.third, self.dtype)
                self.reject_nan(source.entry.key, loaded[name])
                continue
            assert source.scale is not None  # every format has one
            linear = isinstance(self.model.get_submodule(layer), nn.Linear)
            if linear and stays_in_8_bits(source, self.fp8):
                if source.format == INT8:
                    kernel("int8_linear")  # says so now where it is not installed
                shared = source.scale.count == 1
                third = None if shared else source.third
                scale = self.read(source.scale, third, torch.float32)
                loaded[name] = self.read(source.entry, source.third)
                loaded[f"{layer}.weight_scale"] = scale.reshape(1 if shared else (-1, 1))
                self.reject_nan(source.scale.key, scale)
            else:
                if dequantized is None:
                    dequantized = dequantize(
                        source.format,
                        self.read(source.entry),
                        self.read(source.scale),
                        source.scale_2 and self.read(source.scale_2),
                        source.convrot_groupsize,
                        self.dtype,
                    )
                loaded[name] = (
                    dequantized if source.third is None else dequantized.chunk(3)[source.third]
                )
            self.reject_nan(source.entry.key, loaded[name])
        return loaded

    def read(
        self, entry: Entry, third: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Return a tensor of the file, or one third of its rows, on the device."""
        tensor = self.readers[entry.file].get_tensor(entry.key)
        if third is not None and tensor.dim():
            tensor = tensor.chunk(3)[third]
        return tensor.to(self.device, dtype)

    def reject_nan(self, key: str, tensor: Tensor) -> None:
        """Raise CheckpointError where a tensor holds NaN or infinite numbers."""
        if not tensor.is_floating_point() or not tensor.numel():
            return
        if tensor.dtype in FP8_DTYPES:  # which have no minimum
            tensor = tensor.bfloat16()
        if torch.stack((tensor.min(), tensor.max())).isfinite().all():  # both are NaN of a NaN
            return
        raise CheckpointError(
            f"{self.layout.path.name}: {key} holds NaN or infinite numbers"
            + (" once cast to float16" if tensor.dtype == torch.float16 else "")
            + ". The file is damaged, or its training diverged"
        )


@contextmanager
def on_all_cores(function: Callable[[In], Out], items: Iterable[In]) -> Iterator[Iterator[Out]]:
    """Yield what the function returns for each item, in order, computed by as many threads as torch
    has, up to `READERS`.

    Each of them computes on its own: one reads while others cast. What has not started is given up
    where the caller leaves."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(min(threads, READERS), initializer=partial(torch.set_num_threads, 1))
    try:
        yield pool.map(function, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # the threads above have set it for all of MKL


def check(
    layout: Layout, shapes: Callable[[Any], dict[str, tuple[int, ...]]] | None = None
) -> None:
    """Raise CheckpointError, saying what the file is and what to do, unless it is a whole L2P
    model.

    shapes: config → name and shape of every tensor of the model; by default `expected_shapes`."""
    name = layout.path.name
    if len(layout.files) == 1 and (shard := SHARD_NAME.search(name)) and int(shard[1]) > 1:
        raise CheckpointError(
            f"{name} is one of {int(shard[1])} shards. Give the folder that holds them all, or"
            " their index"
        )
    if layout.kind == "latent":
        raise CheckpointError(
            f"{name} is a latent {layout.model}, which needs a VAE. "
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
    expected = (shapes or expected_shapes)(layout.config)
    found = {key: source.shape for key, source in layout.tensors.items()}
    if missing := [key for key in expected if key not in found]:
        raise CheckpointError(
            f"{name} lacks {len(missing)} of the model's {len(expected)} tensors (first:"
            f" {missing[0]}). The file is damaged or incomplete. Get it again"
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
        reject_zeros(file)
    for source in layout.tensors.values():
        if source.format is None and source.entry.dtype not in (*FLOATS, *UNSCALED):
            raise CheckpointError(
                f"{name}: {source.entry.key} is {source.entry.dtype} without a weight_scale;"
                " expected floating point, or INT8 with its scale. The file is damaged"
            )


def stays_in_8_bits(source: Source, fp8: bool) -> bool:
    """Whether the weight of a linear layer is multiplied as it is stored."""
    fits = all(length % MULTIPLE == 0 for length in source.shape)
    return source.format == INT8 or fp8 and source.format == E4M3 and fits


def has_fp8(layout: Layout) -> bool:
    """Whether a checkpoint holds weights that `load_model` can keep in FP8."""
    return any(
        stays_in_8_bits(source, True) and source.format == E4M3
        for source in layout.tensors.values()
    )


def bytes_in_memory(layout: Layout, dtype: torch.dtype, fp8: bool = False) -> dict[str, int]:
    """What each tensor takes once it is loaded, by its published name. fp8: as for `load_model`."""
    return {
        name: math.prod(source.shape) * (1 if stays_in_8_bits(source, fp8) else dtype.itemsize)
        for name, source in layout.tensors.items()
    }


def expected_shapes(
    config: PixelConfig, shallow: Mapping[str, Tensor] | None = None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model. Only one block of each stack is built: a file may
    claim thousands.

    shallow: the tensors of the model with one block in each stack; by default it is built."""
    if shallow is None:
        shallow = config.shallow().build().state_dict()
    expected = {}
    for stack, tensors in groupby(shallow.items(), key=lambda item: item[0].partition(".")[0]):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors}
        if stack not in config.depths:
            expected.update(shapes)
        for number in range(config.depths.get(stack, 0)):
            expected.update(
                {name.replace(".0.", f".{number}.", 1): shape for name, shape in shapes.items()}
            )
    return expected


def missing_layers(layout: Layout) -> str:
    """ "5..24": the gap in the main layers, or in one stack of them, that a trained part leaves.
    Empty where there is none."""
    for stack in layout.backbone.stacks if layout.backbone else ("layers",):
        depths = block_numbers(layout.tensors, stack)
        if absent := sorted(set(range(max(depths, default=-1) + 1)) - depths):
            return f"{absent[0]}..{absent[-1]}"
    return ""
