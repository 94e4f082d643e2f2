"""The command `l2p synthesize`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from ..settings import MAX_COUNT, checked
from .arguments import add_ray, check_ray, share


def add_synthesize(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p synthesize`."""
    from ..train.config import SynthesizeConfig

    parser = commands.add_parser(
        "synthesize",
        help="generate training images with the latent model, and write their prompts",
        description=(
            "Generate training images with a latent Z-Image through diffusers. The output is a"
            " folder for l2p train: images/ and metadata.csv with the seeds. The same command"
            " resumes an interrupted run. Under `accelerate launch`, the images are divided among"
            " the processes; with --ray, among the GPUs of a cluster."
        ),
    )
    parser.add_argument(
        "prompts",
        nargs="?",
        type=Path,
        metavar="PROMPTS",
        help=(
            "a prompt file: .txt (one prompt per line), or .csv, .json or .jsonl with a column"
            " prompt or text. With --write-prompts: the .txt file to write (default: prompts.txt"
            " in the output folder)"
        ),
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the latent model, such as Z-Image-Turbo; without --model only prompts are written",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FOLDER", help="output folder"
    )
    for each in fields(SynthesizeConfig):
        parser.add_argument(
            f"--{each.name}",
            type=each.type,
            default=each.default,
            help=f"{each.metadata['help']} (default {each.default})",
        )
    parser.add_argument(
        "--batch", type=int, default=1, help="images generated at a time (default 1)"
    )
    parser.add_argument("--device", help="device to compute on (default: the GPU, if there is one)")
    add_ray(parser)
    writing = parser.add_argument_group("prompts")
    writing.add_argument(
        "--write-prompts",
        type=int,
        metavar="N",
        help=(
            "write N prompts first, of 200 to 350 characters, about categories of a taxonomy; the"
            " text encoder, a language model, writes them"
        ),
    )
    writing.add_argument(
        "--text-encoder",
        metavar="PATH",
        help=(
            "the text encoder that writes the prompts, Qwen3-4B as for l2p generate (default:"
            " that of --model)"
        ),
    )
    writing.add_argument(
        "--tokenizer",
        metavar="FOLDER",
        help="folder of the tokenizer (default: tokenizer/ in or beside the text encoder)",
    )
    writing.add_argument(
        "--templates", action="store_true", help="write prompts by templates, without a model"
    )
    writing.add_argument(
        "--taxonomy",
        type=Path,
        metavar="FILE",
        help=(
            "a text file of categories under '# class' and '## sub-class' (default: the included"
            " one)"
        ),
    )
    writing.add_argument(
        "--prompt-seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the order of categories and of the language model's sampling (default 0)",
    )
    writing.add_argument(
        "--prompt-batch",
        type=int,
        default=16,
        metavar="N",
        help="prompts written at a time (default 16)",
    )

    def run(args: argparse.Namespace) -> None:
        from ..batch import check_batch
        from ..tables import read_rows
        from ..train.synthesize import synthesize

        check_batch(args.batch)
        rank, processes, device = share(args.device)
        check_ray(args, processes)
        if args.prompts is None and not args.write_prompts:
            raise ValueError(
                "no prompts are given; give PROMPTS, or write prompts with --write-prompts N"
            )
        file = args.prompts or args.output / "prompts.txt"
        if args.write_prompts:
            if processes > 1:
                raise ValueError(
                    f"--write-prompts is for one process, but there are {processes}; write the"
                    " prompts first, then generate without that flag"
                )
            write_prompts(args, file, device)
        if not args.model:
            if not args.write_prompts:
                raise ValueError("--model is not given; give the folder of the latent model")
            print(file)
            return
        prompts = []
        for number, row in enumerate(read_rows(file), 1):
            prompt = row["prompt"] if row.get("text") is None else row["text"]
            try:
                prompts.append(str(checked("prompt", prompt)))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from None
        synthesize(
            prompts,
            args.model,
            args.output,
            SynthesizeConfig(
                **{each.name: getattr(args, each.name) for each in fields(SynthesizeConfig)}
            ),
            args.batch,
            device if args.ray is None else args.device,
            rank=rank,
            processes=processes,
            progress=rank == 0,
            ray=args.ray,
            collect=args.collect,
        )
        if rank == 0:
            print(args.output)

    parser.set_defaults(run=run, when_stopped="The same command resumes")


def write_prompts(args: argparse.Namespace, file: Path, device: str) -> None:
    """Write the prompts that `l2p synthesize` asks for."""
    from ..train import prompts

    for flag, value in (
        ("write-prompts", args.write_prompts),
        ("prompt-batch", args.prompt_batch),
    ):
        if not 1 <= value <= MAX_COUNT:
            raise ValueError(f"--{flag} is {value}; expected a number from 1 to {MAX_COUNT}")
    encoder = args.text_encoder or args.model
    if not args.templates and not encoder:
        raise ValueError(
            "--write-prompts needs a language model: give --model or --text-encoder, or"
            " --templates to write prompts without one"
        )
    replaced = prompts.write_prompts(
        file,
        args.write_prompts,
        args.prompt_seed,
        args.taxonomy or prompts.TAXONOMY,
        None if args.templates else prompts.WritingModel(encoder, args.tokenizer, device),
        args.prompt_batch,
    )
    if replaced:
        print(f"{replaced} prompts are templates: the language model gave none that passed")
