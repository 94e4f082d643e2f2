"""The parser of `l2p evaluate`. Light: what computes is imported once it is asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..commands.arguments import add_checkpoint, add_loras, add_machine, add_settings
from ..settings import FIELDS

BENCHMARKS = ("geneval", "dpg", "shapes", "prompts")
SCORED = ("geneval", "dpg", "shapes")
GENERAL = [name for name in FIELDS if name not in ("input_image", "inpaint_mask")]
RESUMES = "The same command resumes; finished work is kept"


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p evaluate`."""
    parser = commands.add_parser(
        "evaluate",
        help="run benchmarks, and compare checkpoints or settings",
        description=(
            "Generate the images of GenEval, DPG-Bench or any prompts, score them, and compare"
            " checkpoints on the same prompts and seeds."
        ),
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    add_write(actions)
    add_score(actions)
    add_compare(actions)


def add_write(actions: argparse._SubParsersAction) -> None:
    """Add `l2p evaluate write`."""
    parser = actions.add_parser(
        "write",
        help="generate a benchmark's images in the folder layout that its scorer reads",
        description=(
            "Generate a benchmark's images in the folder layout that its scorer reads. The file"
            " card.json records the settings. The same command resumes an interrupted run. Under"
            " `accelerate launch` or torchrun, the prompts are divided among the processes."
        ),
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "source",
        nargs="?",
        type=Path,
        metavar="SOURCE",
        help=(
            "where the prompts are. geneval: its evaluation_metadata.jsonl; dpg: its folder of"
            " prompts; prompts: a prompt file as for l2p generate; shapes (the score of the"
            " bundled model): leave it out"
        ),
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="output folder"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only N prompts, spread evenly")
    parser.add_argument(
        "--count",
        type=int,
        metavar="N",
        help=(
            "images for each prompt; each further image adds 1 to the seed (default 4 for geneval"
            " and dpg, else 1)"
        ),
    )
    add_checkpoint(parser)
    add_loras(parser)
    add_settings(parser.add_argument_group("image"), GENERAL)
    add_machine(parser)

    def run(args: argparse.Namespace) -> None:
        from .write import run_write

        run_write(args)

    parser.set_defaults(run=run, when_stopped=RESUMES)


def add_score(actions: argparse._SubParsersAction) -> None:
    """Add `l2p evaluate score`."""
    parser = actions.add_parser(
        "score",
        help="compute a benchmark's scores",
        description=(
            "Apply a benchmark's rules to detections or answers. These come from a file, or from"
            " a model that judges the images of a folder. Only a benchmark's own judge gives its"
            " official scores; scores of other judges are labelled with their names. Writes the"
            " scores as JSON, and a report."
        ),
    )
    parser.add_argument("benchmark", choices=SCORED)
    parser.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help=(
            "a folder that l2p evaluate write made; or a file of detections (geneval) or answers"
            " (dpg), such as those of the official program"
        ),
    )
    parser.add_argument(
        "--detector",
        metavar="PATH",
        help=(
            "geneval: a Mask2Former model of the library transformers, trained on COCO's"
            " instances; or `shapes`, which finds the shapes of the bundled model by measuring the"
            " image"
        ),
    )
    parser.add_argument(
        "--color-model",
        metavar="PATH",
        help=(
            "geneval: a CLIP model of the library transformers, which names colours, such as"
            " openai/clip-vit-large-patch14"
        ),
    )
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="dpg: its dpg_bench.csv, with the questions"
    )
    parser.add_argument(
        "--vqa",
        metavar="PATH",
        help=(
            "dpg: a model of the library transformers that answers questions (BLIP, BLIP-2 or ViLT)"
        ),
    )
    parser.add_argument(
        "--device", help="device to compute on (default: the accelerator, if there is one)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for the scores (default: beside the input)",
    )

    def run(args: argparse.Namespace) -> None:
        from .score import run_score

        run_score(args)

    parser.set_defaults(run=run, when_stopped=RESUMES)


def add_compare(actions: argparse._SubParsersAction) -> None:
    """Add `l2p evaluate compare`."""
    parser = actions.add_parser(
        "compare",
        help="compare checkpoints, formats or settings on the same prompts and seeds",
        description=(
            "Generate the same prompts and seeds with every argument, and compare each with the"
            " first: PSNR, SSIM, LPIPS if it is installed, and the shapes score. An argument is"
            " CHECKPOINT[:NAME=VALUE,...] or a folder that l2p evaluate write made. CHECKPOINT may"
            " be `bundled`, the bundled model. NAME is a setting of l2p generate, or dtype,"
            " decoder_tile, offload, batch_guidance, compile_blocks, attention or fp8. Writes"
            " compare.json, report.html, and sheets of the ten pairs that differ most."
        ),
    )
    parser.add_argument(
        "variants",
        nargs="+",
        metavar="CHECKPOINT",
        help="two or more, such as model.safetensors model.safetensors:sampler=ab2,steps=18",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help=(
            "a prompt file as for l2p generate, or `shapes` for the prompts of the bundled"
            " model's score"
        ),
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="output folder"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="use only N prompts, spread evenly")
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="images for each prompt (default 1)"
    )
    parser.add_argument(
        "--text-encoder",
        metavar="PATH",
        help=(
            "text encoder of all checkpoints (default: text_encoder/ beside each checkpoint; with"
            " --prompts shapes, the bundled one)"
        ),
    )
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", help="folder of the tokenizer, as for l2p generate"
    )
    add_settings(parser.add_argument_group("image"), GENERAL)
    add_machine(parser)

    def run(args: argparse.Namespace) -> None:
        from .compare import run_compare

        run_compare(args)

    parser.set_defaults(run=run, when_stopped=RESUMES, checkpoint=None)
