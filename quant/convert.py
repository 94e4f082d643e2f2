"""A pixel initialisation, where training starts, from a latent model or a lower-resolution L2P
model: `l2p convert`.

What fits by name and shape is copied byte for byte. What is new is drawn from a seed: the patch
embedding, whose name carries the patch size, and the local decoder, or those of its tensors that
the lower resolution has otherwise."""

import math
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..l2p_core.backbones import DECODER, Backbone
from ..l2p_core.config import PUBLISHED_DECODERS, L2PConfig, PixelConfig
from ..l2p_core.files.header import CheckpointError
from ..l2p_core.files.layout import Layout, read_layout
from ..l2p_core.files.load import check, expected_shapes
from ..l2p_core.tokenizer import read_json
from . import stream
from .export import arrange, note_left_out
from .stream import Piece, Progress, write

NEW = ("all_x_embedder.", "local_decoder.")  # parts of a Z-Image that belong to a patch size
LATENT_ONLY = (
    "x_embedder.",
    "all_final_layer.",
    "final_layer.",
    "norm_final.",
)  # of the source, not of any L2P model


def convert(
    source: Path | list[Path],
    output: Path,
    patch: int = 16,
    seed: int = 0,
    progress: bool | Progress = False,
) -> None:
    """Write a pixel initialisation of this patch size, under the published names.

    source: a latent Z-Image or one of `BACKBONES` (file, folder, index or list of shards), or an
    L2P model with a smaller patch. patch: 16, 64, 128 or 160, for about 1K, 4K, 8K or 10K pixels.
    Copied tensors keep their dtype, new ones are FP32. Raises CheckpointError where the source is
    neither, or incomplete."""
    layout = read_layout(source)
    pieces = plan(layout, patch, seed)
    if layout.backbone and layout.kind == "latent":
        check_settings(layout, layout.backbone)
    note_left_out(layout)
    of_zimage = {
        "architecture": "z-image-l2p",
        "implementation": "https://github.com/TencentYoutuResearch/T2I-L2P",
    }
    write(
        output,
        pieces,
        [layout],
        "l2p convert",
        {"patch": patch, "seed": seed},
        {
            **({} if layout.backbone else of_zimage),
            "resolution": f"{64 * patch}x{64 * patch}",
            "title": f"L2P pixel initialisation, patch {patch}",
        },
        progress,
    )


def plan(layout: Layout, patch: int, seed: int) -> list[Piece]:
    """Every tensor of the initialisation, in the model's order: copied or new."""
    expected = expected_shapes(target_config(layout, patch))
    row = layout.backbone
    new = (f"{row.input}.", f"{DECODER}.") if row else NEW
    latent_only = (f"{row.output}.",) if row else LATENT_ONLY
    copied = {
        name: source
        for name, source in layout.tensors.items()
        if expected.get(name) == source.shape
        and not (layout.kind == "latent" and name.startswith(new))
    }
    if lacking := [name for name in expected if name not in copied and not name.startswith(new)]:
        name = lacking[0]
        found = layout.tensors.get(name)
        raise CheckpointError(
            f"{layout.path.name} lacks {len(lacking)} tensors that both models have (first: {name},"
            f" {f'there {found.shape}, ' if found else ''}expected {expected[name]}). If it is one"
            " of several shards, give them all, or their folder"
        )
    names = [*layout.tensors, *(key.removeprefix(layout.prefix) for key in layout.unused)]
    if unknown := [
        name for name in names if name not in expected and not name.startswith((*new, *latent_only))
    ]:
        raise CheckpointError(
            f"{layout.path.name} has {len(unknown)} tensors that no {layout.model} or L2P model"
            f" has (first: {unknown[0]}). It is another kind of model"
        )
    if quantized := [
        name
        for name, source in copied.items()
        if source.format or source.entry.dtype not in stream.TORCH_DTYPES
    ]:
        raise CheckpointError(
            f"{layout.path.name} is quantized (first: {quantized[0]}), and training needs the"
            " numbers as they were. Give the BF16 or FP32 version of the model"
        )
    pieces = {piece.name: piece for piece in arrange(copied, "published")}
    for name, shape in expected.items():
        if name not in pieces:
            fan_in = math.prod(expected[f"{name.rpartition('.')[0]}.weight"][1:])
            pieces[name] = Piece(name, "F32", shape, draw(name, shape, fan_in, seed))
    return [pieces[name] for name in expected]


def target_config(layout: Layout, patch: int) -> PixelConfig:
    """The source's numbers with another patch size and the published decoder for it. Raises
    CheckpointError."""
    if patch not in PUBLISHED_DECODERS:
        raise CheckpointError(
            f"--patch is {patch}; expected one of {', '.join(map(str, PUBLISHED_DECODERS))}"
        )
    if layout.kind != "latent":
        check(layout)
        if layout.config.patch_size >= patch:
            raise CheckpointError(
                f"{layout.path.name} has patch {layout.config.patch_size} already, --patch is"
                f" {patch}; an L2P model is converted to a larger patch only. Train it as it is, or"
                " give a latent Z-Image"
            )
        return layout.config.with_patch(patch)
    # A latent model has every number but those of the pixel parts, which the patch size fixes.
    shapes = {
        name: source.shape for name, source in layout.tensors.items() if not name.startswith(NEW)
    }
    try:
        if layout.backbone:
            # The source keeps its own input projection, which tells the width.
            own = {name: source.shape for name, source in layout.tensors.items()}
            return layout.backbone.config(own, patch).with_patch(patch)
        dim = shapes["cap_embedder.1.weight"][0]
        config = L2PConfig.from_shapes(
            {
                **shapes,
                f"all_x_embedder.{patch}-1.weight": (dim, 3 * patch**2),
                "local_decoder.bottleneck.0.weight": (L2PConfig.bottleneck_dim,),
            }
        )
    except KeyError as missing:
        raise CheckpointError(
            f"{layout.path.name} lacks {missing.args[0]}, which every {layout.model} has. "
            "If it is one of several shards, give them all, or their folder"
        ) from None
    except (ValueError, IndexError, ZeroDivisionError) as odd:
        raise CheckpointError(
            f"{layout.path.name} is no {layout.model}: {odd}. Give "
            + (layout.backbone.repository if layout.backbone else "Z-Image or Z-Image-Turbo")
        ) from None
    return config.with_patch(patch)


def check_settings(layout: Layout, row: Backbone) -> None:
    """Raise CheckpointError where a folder's config.json says what the class would not do by the
    tensors' shapes alone."""
    file = layout.files[0].with_name("config.json")
    if not file.is_file():
        return
    found = read_json(file)
    if "_class_name" not in found:  # another program's
        return
    wanted = {
        "_class_name": row.diffusers_class,
        **row.settings,
        **row.arguments({name: source.shape for name, source in layout.tensors.items()}),
    }
    for key, value in wanted.items():
        value = list(value) if isinstance(value, tuple) else value
        if key in found and found[key] != value:
            raise CheckpointError(
                f"{file} says that {key} is {str(found[key])[:40]}; expected {value}, as in"
                f" {row.repository}. Give that model"
            )


def draw(
    name: str, shape: tuple[int, ...], fan_in: int, seed: int
) -> Callable[[], Iterator[Tensor]]:
    """What makes a new tensor in blocks, float32: torch's initialisation of linear and convolution
    layers, weights and biases alike, which is uniform within 1 / sqrt(fan_in) of 0.

    Drawn from integers (PCG64 seeded with the seed and the name's CRC-32, the top 24 bits of each),
    with one rounded multiplication: every machine gives the same bytes, and no tensor depends on
    another."""

    def blocks() -> Iterator[Tensor]:
        bits, left = np.random.PCG64([seed, zlib.crc32(name.encode())]), math.prod(shape)
        bound = np.float32(1 / math.sqrt(fan_in))
        while left:
            count = min(left, stream.BLOCK)
            steps = (bits.random_raw(count) >> np.uint64(40)).astype(
                np.float32
            )  # 0 .. 2**24 - 1, exact
            yield torch.from_numpy((steps * np.float32(2**-23) - np.float32(1)) * bound)
            left -= count

    return blocks
