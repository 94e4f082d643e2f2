"""The commands for checkpoint files: inspect, convert, merge, quantize, export."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..files.content import printable


def add_inspect(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p inspect`."""
    parser = commands.add_parser(
        "inspect",
        help="report what a checkpoint is, from its header alone",
        description="Report what a checkpoint is, from its header alone.",
    )
    parser.add_argument("checkpoint", type=Path, help="file, index or folder of shards")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")

    def run(args: argparse.Namespace) -> None:
        from ..files.describe import describe, report

        facts = describe(args.checkpoint)
        print(json.dumps(facts, indent=1) if args.json else printable(report(facts)))

    parser.set_defaults(run=run, when_stopped="Nothing was changed")


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p convert`."""
    parser = commands.add_parser(
        "convert",
        help="make a pixel initialisation to train from",
        description=(
            "Make a pixel initialisation from a latent Z-Image, Z-Image-Turbo, FLUX.2-klein or"
            " Qwen-Image, or from a trained L2P model of a smaller patch. Tensors that fit are"
            " copied; the others are initialised from the seed."
        ),
    )
    parser.add_argument(
        "source",
        nargs="*",
        type=Path,
        help="a file, a folder or index of shards, or all the shards",
    )
    parser.add_argument(
        "--latent_ckpt_files",
        nargs="+",
        type=Path,
        default=[],
        metavar="SHARD",
        help="the source files; this is the flag of the published script",
    )
    parser.add_argument(
        "-o",
        "--output",
        "--output_path",
        type=Path,
        required=True,
        metavar="FILE",
        help="the new file",
    )
    parser.add_argument(
        "--patch",
        type=int,
        default=16,
        help=(
            "side of a patch in pixels: 16, 64, 128 or 160 for the trained resolutions 1K, 4K, 8K"
            " or 10K (default 16)"
        ),
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the new tensors (default 0)")

    def run(args: argparse.Namespace) -> None:
        from ...quant.convert import convert

        if not (sources := args.source + args.latent_ckpt_files):
            raise ValueError("no source is given; give the latent model, or a trained L2P model")
        convert(sources, args.output, args.patch, args.seed, progress=True)
        print(args.output)

    parser.set_defaults(run=run, when_stopped="Nothing was changed")


def add_merge(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p merge`."""
    from ...quant.export import DTYPES

    parser = commands.add_parser(
        "merge",
        help="merge trained tensors into their pixel initialisation, or a LoRA into its model",
        description=(
            "Merge trained tensors into the pixel initialisation that training started from, or a"
            " LoRA into its base model."
        ),
    )
    parser.add_argument(
        "--trained",
        "--file_a",
        type=Path,
        required=True,
        metavar="FILE",
        help="the trained tensors (step-N.safetensors), or the LoRA",
    )
    parser.add_argument(
        "--base",
        "--file_b",
        type=Path,
        required=True,
        metavar="FILE",
        help="the pixel initialisation, or the LoRA's base model",
    )
    parser.add_argument(
        "-o",
        "--output",
        "--file_out",
        type=Path,
        required=True,
        metavar="FILE",
        help="the new file",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of all tensors (default: each tensor keeps its own)"
    )
    parser.add_argument(
        "--skip",
        action="append",
        metavar="PATTERN",
        help="leave out trained tensors by name, such as 'layers.0.*'; may be repeated",
    )
    parser.add_argument(
        "--strength", type=float, metavar="X", help="strength of a LoRA (default 1)"
    )

    def run(args: argparse.Namespace) -> None:
        from ...quant.merge import merge

        merge(
            args.trained,
            args.base,
            args.output,
            args.dtype,
            args.skip,
            args.strength,
            progress=True,
        )
        print(args.output)

    parser.set_defaults(run=run, when_stopped="Nothing was changed")


def add_quantize(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p quantize`."""
    from ...quant.quantize import PRESETS
    from ..files.quantization import FORMATS

    parser = commands.add_parser(
        "quantize",
        help="make an INT8, FP8 or 4-bit model, a third of the size or less",
        description=(
            "Write a whole model with its large linears in 8 or 4 bits, in a format that ComfyUI"
            " and this program load directly. Prints the quantization error of each tensor."
        ),
    )
    parser.add_argument("checkpoint", type=Path, help="file, index or folder of shards")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the new file"
    )
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="int8_tensorwise",
        help=(
            "format of the weights (default int8_tensorwise). l2p computes in INT8 and"
            " dequantizes the other formats. ComfyUI computes in FP8 on RTX 40 and newer, and in"
            " mxfp8 and nvfp4 (4 bits) on RTX 50 and newer"
        ),
    )
    parser.add_argument(
        "--granularity",
        choices=FORMATS["int8_tensorwise"].granularities,
        help=(
            "for INT8: one scale for each row (default), one for each tensor, or one for each row"
            " after a rotation that spreads outliers (convrot)"
        ),
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="card",
        help=(
            "which linears are quantized. card: those of all main layers but the first; small:"
            " those of all blocks (default card)"
        ),
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help=(
            "also quantize tensors of this name; give ComfyUI's names, such as"
            " 'layers.0.*.w1.weight'; may be repeated"
        ),
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep tensors of this name in BF16; may be repeated",
    )
    parser.add_argument(
        "--prefix",
        default="model.diffusion_model.",
        help="key prefix of the tensor names (default model.diffusion_model.)",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write the whole report as JSON"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the written file back and compare it with the source",
    )

    def run(args: argparse.Namespace) -> None:
        from ...quant.quantize import Options, quantize, save_report, table

        options = Options(
            args.format, args.granularity, args.preset, args.include, args.exclude, args.prefix
        )
        facts = quantize(args.checkpoint, args.output, options, args.verify, progress=True)
        if args.report:
            save_report(facts, args.report)
        print(table(facts))

    parser.set_defaults(run=run, when_stopped="Nothing was changed")


def add_export(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p export`."""
    from ...quant.export import DTYPES, PREFIXES

    parser = commands.add_parser(
        "export",
        help="write a model with other tensor names or in another dtype",
        description=(
            "Write an L2P model or a trained part with other tensor names or in another dtype. "
            "INT8 stays INT8 unless --dtype dequantizes it."
        ),
    )
    parser.add_argument("checkpoint", type=Path, help="file, index or folder of shards")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the new file"
    )
    parser.add_argument(
        "--naming",
        choices=PREFIXES,
        default="comfyui",
        help=(
            "tensor names: those of T2I-L2P, or those of ComfyUI with q, k and v packed (default"
            " comfyui)"
        ),
    )
    parser.add_argument(
        "--prefix",
        help="key prefix (default: none for published, model.diffusion_model. for comfyui)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of all tensors (default: each tensor keeps its own)"
    )
    parser.add_argument(
        "--convrot",
        type=int,
        metavar="GROUP",
        help="group size of rotated INT8 weights, for a file without a marker for the rotation",
    )

    def run(args: argparse.Namespace) -> None:
        from ...quant.export import export

        export(
            args.checkpoint,
            args.output,
            args.naming,
            args.prefix,
            args.dtype,
            args.convrot,
            progress=True,
        )
        print(args.output)

    parser.set_defaults(run=run, when_stopped="Nothing was changed")
