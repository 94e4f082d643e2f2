"""The command `l2p generate`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..settings import FIELDS
from .arguments import (
    add_checkpoint,
    add_loras,
    add_machine,
    add_output,
    add_ray,
    add_settings,
    check_ray,
    file_and_strength,
    pipeline_arguments,
    print_bundled,
    share,
)

if TYPE_CHECKING:
    from ..batch import Job
    from ..options import PipelineOptions
    from ..pipeline import L2PPipeline


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p generate`."""
    parser = commands.add_parser(
        "generate",
        help="generate images from prompts",
        description=(
            "Generate images from a prompt or a file of prompts. The same command resumes an"
            " interrupted run: images that exist with the same settings are kept. Under `accelerate"
            " launch` or torchrun, the prompts are divided among the processes; with --ray, among"
            " those of a cluster."
        ),
    )
    parser.add_argument("prompt", nargs="?", help="what to generate")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=(
            "a prompt file: .txt (one prompt per line), .csv, .json or .jsonl (columns prompt or"
            " text, and optionally file_name, seed and any other setting below)"
        ),
    )
    add_output(parser)
    add_checkpoint(parser)
    add_loras(parser)
    image = parser.add_argument_group("image")
    add_settings(image, FIELDS)
    image.add_argument(
        "--count",
        type=int,
        default=1,
        help="images for each prompt; each further image adds 1 to the seed (default 1)",
    )
    machine = add_machine(parser)
    add_ray(machine)
    machine.add_argument(
        "--estimate",
        action="store_true",
        help=(
            "print the peak memory and the number of passes, from the checkpoint's header alone;"
            " generate nothing"
        ),
    )
    machine.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="with --estimate: plan for an accelerator with this much free memory",
    )

    def run(args: argparse.Namespace) -> None:
        from ..batch import generate, plan
        from ..options import PipelineOptions
        from ..tables import read_rows

        if (args.prompt is None) == (args.prompts is None) and not args.estimate:
            raise ValueError(
                "no prompt is given; give a prompt, or a file of prompts with --prompts"
            )
        rank, processes, device = share(args.device)
        check_ray(args, processes)
        options = PipelineOptions(
            {**pipeline_arguments(args), "progress": args.checkpoint is not None},
            batch=args.batch,
            loras=tuple(map(file_and_strength, args.lora)),
        )
        pipe = options.open("cpu" if args.ray is not None else device)
        if args.checkpoint is None and rank == 0:
            print_bundled()
        rows = read_rows(args.prompts) if args.prompts else [{"prompt": args.prompt or ""}]
        settings = {name: getattr(args, name) for name in FIELDS if name != "prompt"}
        jobs = plan(rows, settings, args.count, args.output, pipe)
        if args.estimate:
            print_estimate(pipe, jobs, args.batch, args.free_text_encoder, args.memory)
            return
        if args.ray is not None:
            generate_on_cluster(args, jobs, pipe, options)
        else:
            generate(
                jobs[rank::processes],
                pipe,
                args.batch,
                args.free_text_encoder,
                args.overwrite,
                progress=rank == 0,
            )
        if rank == 0:
            print(args.output)

    parser.set_defaults(run=run, when_stopped="The same command resumes")


def generate_on_cluster(
    args: argparse.Namespace, jobs: list[Job], pipe: L2PPipeline, options: PipelineOptions
) -> None:
    """Generate by the actors of a Ray cluster."""
    from ..cluster.generate import generate

    if args.free_text_encoder:
        raise ValueError(
            "--free-text-encoder cannot be combined with --ray, because prompts reach a GPU one"
            " after another. Leave it out: a text encoder that does not fit beside the model then"
            " runs on the CPU"
        )
    generate(jobs, pipe, options, args.ray, args.device, args.collect, args.overwrite)


def print_estimate(
    pipe: L2PPipeline,
    jobs: list[Job],
    batch: int,
    free_text_encoder: bool | None,
    memory: float | None,
) -> None:
    """Print what the largest image takes. memory: GB of free memory to plan for; None for what the
    device has."""
    from ..batch import largest_of
    from ..estimate import estimate
    from ..meter import table

    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory is {memory}; expected a number of GB above 0")
    largest = largest_of(jobs)
    free = None if memory is None else int(memory * 1e9)
    placement = pipe.place(largest, batch, free_text_encoder, free)
    pipe.adopt(placement)
    freed = placement.free_text_encoder or placement.encode_on_cpu
    parts, passes = estimate(pipe, largest, batch, freed, placement.encode_on_cpu)
    told = ", then ".join(
        f"{count} of {batch} x {width} x {height} pixels" for count, height, width in passes
    )
    print(table(parts))
    print(f"placement: {placement.reason}")
    print(f"passes through the model: {told}")
    if not pipe.text_encoder_path.exists():
        print(f"the text encoder is not counted: {pipe.text_encoder_path} does not exist")
