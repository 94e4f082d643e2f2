"""Arguments that several commands share: checkpoint, pipeline, settings of an image."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..settings import AUTO, BACKENDS, FIELDS, describe, kind


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model to use."""
    parser.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="file, index or folder of shards (default: the bundled small model)",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="PATH",
        help=(
            "Qwen3-4B: a folder such as Z-Image-Turbo, or qwen_3_4b.safetensors (default:"
            " text_encoder/ beside the checkpoint)"
        ),
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="folder of the tokenizer (default: tokenizer/ in or beside the text encoder)",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add `-o`, an image or a folder of images."""
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        metavar="PATH",
        help="a .png for one image, a folder for several (default out.png)",
    )


def add_overwrite(parser: argparse._ActionsContainer) -> None:
    """Add `--overwrite`."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace images that exist with other settings",
    )


def add_loras(parser: argparse.ArgumentParser) -> None:
    """Add `--lora`, which `file_and_strength` reads."""
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA of the checkpoint; may be repeated (default strength 1)",
    )


def add_machine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the flags that say where many images are generated, and return their group."""
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images generated at a time (default 1)"
    )
    machine.add_argument(
        "--device", help="device to compute on (default: the accelerator, if there is one)"
    )
    add_pipeline(machine)
    machine.add_argument(
        "--free-text-encoder",
        action=argparse.BooleanOptionalAction,
        help=(
            "encode all prompts first, then free the text encoder (default: if it does not fit"
            " beside the model)"
        ),
    )
    add_overwrite(machine)
    return machine


def add_pipeline(machine: argparse._ArgumentGroup) -> None:
    """Add the flags that say how the model is loaded and run."""
    machine.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help=(
            "dtype to compute in (default: bfloat16; float16 on NVIDIA cards older than RTX 30;"
            " float32 for a small model on a CPU)"
        ),
    )
    machine.add_argument(
        "--convrot",
        type=int,
        metavar="GROUP",
        help="group size of rotated INT8 weights, for a file without a marker for the rotation",
    )
    machine.add_argument(
        "--decoder-tile",
        type=int,
        metavar="PIXELS",
        help=(
            "the local decoder computes in tiles of this side: the same image in less memory; 0"
            " means no tiles (default: tiles for large images)"
        ),
    )
    machine.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        help=(
            "offload the model to the CPU and prefetch one block at a time (default: if the model"
            " does not fit)"
        ),
    )
    machine.add_argument(
        "--batch-guidance",
        action="store_true",
        help="run both passes of a guided step as one batch of twice the size",
    )
    machine.add_argument(
        "--compile-blocks",
        action="store_true",
        help="compile the model's blocks (torch.compile); the first images take longer",
    )
    machine.add_argument(
        "--fp8",
        action="store_true",
        help=(
            "keep the weights of an FP8 checkpoint in 8 bits and multiply in FP8, on cards that can"
            " (RTX 40, H100 and newer); by default they are dequantized on load"
        ),
    )
    machine.add_argument(
        "--attention",
        choices=BACKENDS,
        default=AUTO,
        help=(
            "attention kernel: torch's choice (default), one of torch's, or SageAttention, which"
            " computes in 8 bits and must be installed"
        ),
    )


def add_ray(machine: argparse._ActionsContainer, collect: bool = True) -> None:
    """Add `--ray`, and `--collect` where files are written."""
    machine.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help=(
            "use all GPUs of the Ray cluster at HOST:PORT, to which this machine must belong."
            " Without ADDRESS, use the cluster that the variable RAY_ADDRESS names; if it is not"
            " set, use this machine alone. Needs pip install 'comfyui-l2p[ray]'"
        ),
    )
    if collect:
        machine.add_argument(
            "--collect",
            action="store_true",
            help="with --ray: send images here (default: the machines share the output folder)",
        )


def check_ray(args: argparse.Namespace, processes: int = 1) -> None:
    """Raise ImportError where --ray is given and Ray is not installed, and ValueError for flags
    that do not fit."""
    if args.ray is None:
        if getattr(args, "collect", False):
            raise ValueError("--collect is for a Ray cluster; give --ray too")
        return
    require("ray", ("ray",))
    if processes > 1:
        raise ValueError(
            f"--ray is for one process, but there are {processes}; start l2p without a launcher"
        )


def pipeline_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_checkpoint` and `add_pipeline` are called by
    `L2PPipeline.from_pretrained`."""
    import torch

    return {
        "checkpoint": args.checkpoint,
        "text_encoder": args.text_encoder,
        "tokenizer": args.tokenizer,
        "torch_dtype": getattr(torch, args.dtype) if args.dtype else None,
        "convrot_groupsize": args.convrot,
        "decoder_tile": args.decoder_tile,
        "offload": args.offload,
        "batch_guidance": args.batch_guidance,
        "compile_blocks": args.compile_blocks,
        "attention": args.attention,
        "fp8": args.fp8,
    }


def add_settings(
    group: argparse._ArgumentGroup, names: Iterable[str], defaults: bool = True
) -> None:
    """Add a flag for each of these settings but the prompt. defaults: name them in the help."""
    for name in names:
        about = FIELDS[name].metadata
        if name != "prompt":
            metavar = about.get("metavar") or {int: "N", float: "X", str: "NAME"}[kind(name)]
            help = describe(name) if defaults else about["help"]
            group.add_argument(
                about.get("flag", "--" + name.replace("_", "-")),
                dest=name,
                metavar=metavar,
                help=help.replace("%", "%%"),
            )


def file_and_strength(given: str) -> tuple[str, float]:
    """A LoRA's file and strength, of FILE[:STRENGTH]. A colon may also be part of a path."""
    file, _, strength = given.rpartition(":")
    try:
        return (file, float(strength)) if file else (given, 1.0)
    except ValueError:
        return given, 1.0


def share(device: str | None) -> tuple[int, int, str]:
    """This process's number, how many there are, and its device: a GPU of its own where there are
    GPUs."""
    from ..devices import default_device

    device = device or default_device().type
    if device in ("cuda", "xpu"):
        device = f"{device}:{os.environ.get('LOCAL_RANK', 0)}"
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device


def require(extra: str, modules: tuple[str, ...]) -> None:
    """Raise ImportError, saying what to install, where one of these modules is missing."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{missing[0]} is not installed; it comes with: pip install 'comfyui-l2p[{extra}]'"
        )


def print_bundled() -> None:
    """Print that the bundled model is used, and what it knows."""
    from ..pipeline import BUNDLED_MODEL

    print(
        "No --checkpoint given: using the bundled small model, which generates only plain shapes"
        f" (see {BUNDLED_MODEL.parent / 'README.md'}). What a prompt leaves open is chosen at"
        " random."
    )
