"""The command `l2p`: one subcommand per function, no logic of the model's.

Only light modules are imported here. torch takes seconds to import: `main` imports it once it can
answer an interrupt."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Iterable
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate.command import add_evaluate
from .files.content import printable
from .files.header import CheckpointError
from .interrupt import STATUS, Terminated, ending_at_once, stop_at_eof
from .remote.workflow import PLACES
from .settings import FIELDS, MAX_COUNT, checked, describe, kind

if TYPE_CHECKING:
    from .batch import Job
    from .pipeline import L2PPipeline


def program() -> None:
    """Run `l2p` as a program.

    After an interrupt it ends at once: taking torch apart takes seconds, and a launcher that stops
    its processes waits. Threads that wait for others sleep, unless OMP_WAIT_POLICY says otherwise:
    by default they spin, which on a busy machine takes the cores from those they wait for."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
    for stream in (sys.stdout, sys.stderr):  # a name may hold what the terminal can't show
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    status = main()
    if status in STATUS.values():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> int:
    """Run `l2p` with these arguments.

    Returns the exit status: 0 done, 1 rejected with a message, or found faulty by `l2p doctor`, 130
    interrupted (Ctrl-C), 143 terminated (SIGTERM)."""
    with ending_at_once():
        import torch

        args = make_parser().parse_args(arguments)
        warnings.showwarning = lambda message, *_: print(
            f"l2p: note: {printable(message)}", file=sys.stderr
        )
    try:
        status = args.run(args)
    except (CheckpointError, ValueError, OSError, ImportError) as error:
        print(f"l2p: {printable(error)}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print(f"l2p: out of GPU memory. {args.when_full}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"l2p: stopped. {args.when_stopped}", file=sys.stderr)
        return STATUS[signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT]
    return status or 0


class Parser(argparse.ArgumentParser):
    """Takes --learning_rate for --learning-rate, and names the nearest flag where one is
    unknown."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and end with the command's own usage where a flag is unknown."""
        given = map(self.with_dashes, sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(list(given), namespace)
        flags = [each.partition("=")[0] for each in unknown if each.startswith("--")]
        if flags:
            near = difflib.get_close_matches(flags[0], self._option_string_actions, 1)
            self.error(
                f"unrecognized arguments: {' '.join(flags)}"
                + (f"; did you mean {near[0]}?" if near else f"; {self.prog} --help lists them")
            )
        return found, unknown

    def with_dashes(self, argument: str) -> str:
        """Return a flag of this command under its own name; values stay as they are."""
        flag, equals, value = argument.partition("=")
        dashed = "--" + flag[2:].replace("_", "-")
        known = flag not in self._option_string_actions and dashed in self._option_string_actions
        return dashed + equals + value if flag.startswith("--") and known else argument


def make_parser() -> argparse.ArgumentParser:
    """Build the parser with all commands."""
    parser = Parser(
        prog="l2p", description="Generate images with L2P checkpoints, and make such checkpoints."
    )
    parser.set_defaults(
        when_full=(
            "Try --free-text-encoder, --offload, a smaller --batch or size, --redraw tiled, or"
            " the INT8 checkpoint; --estimate tells what each takes"
        )
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands)
    add_serve(commands)
    add_evaluate(commands)
    add_queue(commands)
    add_inspect(commands)
    add_doctor(commands)
    add_convert(commands)
    add_merge(commands)
    add_quantize(commands)
    add_export(commands)
    add_synthesize(commands)
    add_train(commands)
    return parser


def add_generate(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p generate`."""
    parser = commands.add_parser(
        "generate",
        help="generate images from prompts",
        description=(
            "Generate images from a prompt or a file of prompts. The same command resumes an"
            " interrupted run: images that exist with the same settings are kept. Under `accelerate"
            " launch` or torchrun, the prompts are split over the processes."
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
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        metavar="PATH",
        help="a .png for one image, a folder for several (default out.png)",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="a LoRA of the checkpoint; may be given again (default strength 1)",
    )
    image = parser.add_argument_group("image")
    add_settings(image, FIELDS)
    image.add_argument(
        "--count",
        type=int,
        default=1,
        help="images for each prompt, with seeds one apart (default 1)",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--batch", type=int, default=1, help="images generated at a time (default 1)"
    )
    machine.add_argument("--device", help="default: the accelerator where there is one")
    add_pipeline(machine)
    machine.add_argument(
        "--free-text-encoder",
        action=argparse.BooleanOptionalAction,
        help=(
            "encode all prompts first, then free the encoder's memory (default: where it does not"
            " fit beside the model)"
        ),
    )
    machine.add_argument(
        "--overwrite",
        action="store_true",
        help="replace images that exist with other settings",
    )
    machine.add_argument(
        "--estimate",
        action="store_true",
        help=(
            "say how much memory this takes and how often the model runs, by the "
            "checkpoint's header alone"
        ),
    )
    machine.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="with --estimate: plan for an accelerator with so much free memory",
    )

    def run(args: argparse.Namespace) -> None:
        from .batch import generate, plan
        from .pipeline import L2PPipeline
        from .tables import read_rows

        if (args.prompt is None) == (args.prompts is None) and not args.estimate:
            raise ValueError("give a prompt, or a file of them with --prompts")
        rank, processes, device = share(args.device)
        pipe = L2PPipeline.from_pretrained(
            **pipeline_arguments(args), device=device, progress=args.checkpoint is not None
        )
        for given in args.lora:
            pipe.load_lora(*file_and_strength(given))
        if args.checkpoint is None and rank == 0:
            print_bundled()
        rows = read_rows(args.prompts) if args.prompts else [{"prompt": args.prompt or ""}]
        settings = {name: getattr(args, name) for name in FIELDS if name != "prompt"}
        jobs = plan(rows, settings, args.count, args.output, pipe)
        if args.estimate:
            print_estimate(pipe, jobs, args.batch, args.free_text_encoder, args.memory)
            return
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


def print_bundled() -> None:
    """Print that the bundled model is used, and what it knows."""
    from .pipeline import BUNDLED_MODEL

    print(
        "No --checkpoint given: using the bundled small model, which knows plain shapes"
        f" ({BUNDLED_MODEL.parent / 'README.md'}). What a prompt leaves open is filled in at random"
    )


def file_and_strength(given: str) -> tuple[str, float]:
    """A LoRA's file and strength, of FILE[:STRENGTH]. A colon may also be part of a path."""
    file, _, strength = given.rpartition(":")
    try:
        return (file, float(strength)) if file else (given, 1.0)
    except ValueError:
        return given, 1.0


def print_estimate(
    pipe: L2PPipeline,
    jobs: list[Job],
    batch: int,
    free_text_encoder: bool | None,
    memory: float | None,
) -> None:
    """Print what the largest image takes. memory: GB of free memory to plan for; None for what the
    device has."""
    from .batch import largest_of
    from .estimate import estimate
    from .meter import table

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
        "--tokenizer", metavar="FOLDER", help="default: tokenizer/ in or beside the text encoder"
    )


def add_pipeline(machine: argparse._ArgumentGroup) -> None:
    """Add the flags that say how the model is loaded and run."""
    machine.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help=(
            "default: bfloat16; float16 on NVIDIA cards older than RTX 30; float32 for a small"
            " model on a CPU"
        ),
    )
    machine.add_argument(
        "--convrot",
        type=int,
        metavar="GROUP",
        help="group size of rotated INT8 weights in a file that does not say so",
    )
    machine.add_argument(
        "--decoder-tile",
        type=int,
        metavar="PIXELS",
        help=(
            "side of the tiles that the local decoder computes one after another: the same"
            " image in less memory; 0 for no tiles (default: tiles for large images)"
        ),
    )
    machine.add_argument(
        "--offload",
        action=argparse.BooleanOptionalAction,
        help=(
            "keep the model in the CPU's memory, and on the GPU only the block that computes and"
            " the next (default: where it does not fit)"
        ),
    )
    machine.add_argument(
        "--batch-guidance",
        action="store_true",
        help="both passes of a guided step as one of twice the batch",
    )
    machine.add_argument(
        "--compile-blocks",
        action="store_true",
        help="compile the model's blocks, which takes a while at the first images",
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


def share(device: str | None) -> tuple[int, int, str]:
    """This process's number, how many there are, and its device: a GPU of its own where there are
    GPUs."""
    from .devices import default_device

    device = device or default_device().type
    if device in ("cuda", "xpu"):
        device = f"{device}:{os.environ.get('LOCAL_RANK', 0)}"
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device


def add_serve(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p serve`."""
    parser = commands.add_parser(
        "serve",
        help="serve a web page and an API that generate images",
        description=(
            "Serve a web page, and an HTTP API in the form of OpenAI's images API. The model is"
            " loaded once for each GPU, or once on the CPU. Needs pip install"
            " 'comfyui-l2p[serve]'."
        ),
    )
    add_checkpoint(parser)
    network = parser.add_argument_group("network")
    network.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen at; 0.0.0.0 for all, which needs an API key (default 127.0.0.1)",
    )
    network.add_argument(
        "--port", type=int, default=23231, metavar="N", help="0 for any free one (default 23231)"
    )
    network.add_argument(
        "--api-key",
        metavar="KEY",
        help=(
            "guards page and API; every user of this machine can read it in the list of processes,"
            " so prefer one of the other two (default: L2P_API_KEY of the environment)"
        ),
    )
    network.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="a file that holds the API key"
    )
    network.add_argument(
        "--no-auth",
        action="store_true",
        help="let everyone who reaches the address use the server without a key",
    )
    machine = parser.add_argument_group("machine")
    machine.add_argument(
        "--gpus", metavar="N,N", help="GPUs to use, such as 0,2 (default: all visible ones)"
    )
    machine.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes for each GPU, or on the CPU (default 1)",
    )
    machine.add_argument(
        "--batch",
        type=int,
        default=1,
        metavar="N",
        help="waiting images of equal settings to generate at a time (default 1)",
    )
    add_pipeline(machine)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="largest height and width (default: twice the trained resolution)",
    )
    for name, default, help in (
        ("steps", 100, "most steps of an image"),
        ("images", 10, "most images of a request"),
        ("queue", 200, "most images that wait"),
    ):
        limits.add_argument(
            f"--max-{name}",
            type=int,
            default=default,
            metavar="N",
            help=f"{help} (default {default})",
        )
    limits.add_argument(
        "--max-upload-mb",
        type=float,
        default=20,
        metavar="MB",
        help="largest request, uploaded images included (default 20)",
    )

    parser.add_argument(
        "--language",
        choices=("en", "zh"),
        help="language of the page (default: what the browser prefers)",
    )

    def run(args: argparse.Namespace) -> None:
        needed = ("fastapi", "fastapi_offline", "uvicorn", "python_multipart", "prometheus_client")
        require("serve", needed)
        from .serve.run import ServeOptions, read_gpus, read_key, serve
        from .serve.worker import PipelineOptions

        options = ServeOptions(
            host=args.host,
            port=args.port,
            gpus=read_gpus(args.gpus),
            workers=args.workers,
            batch=args.batch,
            key=read_key(args.api_key, args.api_key_file),
            no_auth=args.no_auth,
            language=args.language,
            max_side=args.max_side,
            max_steps=args.max_steps,
            max_images=args.max_images,
            max_queue=args.max_queue,
            max_upload_mb=args.max_upload_mb,
        )
        if args.checkpoint is None:
            print_bundled()
        serve(options, PipelineOptions(pipeline_arguments(args), batch=args.batch))

    parser.set_defaults(run=run, when_stopped="Images that were not finished are lost")


def require(extra: str, modules: tuple[str, ...]) -> None:
    """Raise ImportError, saying what to install, where one of these modules is missing."""
    from importlib.util import find_spec

    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{missing[0]} is not installed; it comes with: pip install 'comfyui-l2p[{extra}]'"
        )


def add_queue(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p queue`."""
    parser = commands.add_parser(
        "queue",
        help="run a workflow on ComfyUI servers, with many prompts",
        description=(
            "Send a workflow to one or several ComfyUI servers with these values filled in, and"
            " fetch the images. A value goes to the input of that name; several inputs that say"
            " the same in the workflow are filled alike. The same command resumes an interrupted"
            " run: images that exist with the same settings are kept."
        ),
    )
    parser.add_argument(
        "workflow",
        type=Path,
        metavar="WORKFLOW.json",
        help="in API format (ComfyUI: Workflow > Export (API))",
    )
    parser.add_argument(
        "--server",
        action="append",
        metavar="URL",
        help=(
            "may be given again: a free server takes the next image (default http://127.0.0.1:8188)"
        ),
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("out.png"),
        metavar="PATH",
        help="a .png for one image, a folder for several (default out.png)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="SECONDS",
        help="how long to wait for a server that is away or restarts (default 600)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace images that exist with other settings",
    )
    image = parser.add_argument_group("image", "what is not given stays as it is in the workflow")
    texts = image.add_mutually_exclusive_group()
    texts.add_argument("--prompt", metavar="TEXT", help="what to generate")
    texts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help=(
            "many prompts: .txt (a prompt a line), .csv, .json or .jsonl (columns file_name, "
            f"{', '.join(PLACES)}, or NODE.INPUT)"
        ),
    )
    add_settings(image, [name for name in FIELDS if name in PLACES], defaults=False)
    image.add_argument(
        "--count",
        type=int,
        default=1,
        help="images for each prompt, with seeds one apart (default 1)",
    )
    image.add_argument("--model", metavar="NAME", help="checkpoint, as the server lists it")
    image.add_argument("--text-encoder", metavar="NAME", help="as the server lists it")
    image.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="any other input; NODE is the node's id, title or class; may be given again",
    )

    def run(args: argparse.Namespace) -> None:
        from .remote.queue import queue

        settings = {name: getattr(args, name, None) for name in PLACES}
        queue(
            args.workflow,
            args.output,
            args.server or ["http://127.0.0.1:8188"],
            args.prompts,
            settings,
            args.set,
            args.count,
            args.timeout,
            args.overwrite,
        )
        print(args.output)

    parser.set_defaults(
        run=run,
        when_stopped=("Our jobs were taken off the servers; the same command resumes"),
    )


def add_inspect(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p inspect`."""
    parser = commands.add_parser("inspect", help="say what a checkpoint is, from its header alone")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--json", action="store_true", help="for programs")

    def run(args: argparse.Namespace) -> None:
        from .files.describe import describe, report

        facts = describe(args.checkpoint)
        print(json.dumps(facts, indent=1) if args.json else printable(report(facts)))

    parser.set_defaults(run=run, when_stopped="Nothing was changed")


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="test this installation, or a checkpoint and its text encoder",
        description=(
            "Without a checkpoint: say what is installed, compare an image of the bundled model"
            " with a recorded one, and prove that the model denoises. With one: compare its tensors"
            " with the published files, and prove that it denoises an image better than any"
            " baseline. A fault is named. Exit status 1 where anything fails."
        ),
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="file, index or folder of shards")
    parser.add_argument("--text-encoder", metavar="PATH", help="as for l2p generate")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="as for l2p generate")
    parser.add_argument("--device", help="default: the accelerator where there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--convrot", type=int, metavar="GROUP", help="as for l2p generate")
    parser.add_argument(
        "--image", metavar="FILE", help="denoise this image (default: a scene that is drawn)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what the image shows")
    parser.add_argument(
        "--compare",
        metavar="PATH",
        help="a second checkpoint of the same model, such as its INT8 form",
    )

    def run(args: argparse.Namespace) -> int:
        import torch

        from .doctor import examine, verdict

        failed = 0
        for finding in examine(
            args.checkpoint,
            args.text_encoder,
            args.tokenizer,
            args.device,
            getattr(torch, args.dtype) if args.dtype else None,
            args.convrot,
            args.image,
            args.prompt,
            args.compare,
        ):
            print(finding, flush=True)
            failed += finding.ok is False
        print(verdict(failed))
        return min(failed, 1)

    parser.set_defaults(run=run, when_stopped="Nothing was changed")


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p convert`."""
    parser = commands.add_parser(
        "convert",
        help="make a pixel initialisation to train from",
        description=(
            "Make a pixel initialisation from a latent Z-Image or Z-Image-Turbo, or from a trained"
            " L2P model of a smaller patch. What fits is copied, the rest is drawn from the seed."
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
        help="another way to give them",
    )
    parser.add_argument("-o", "--output", "--output_path", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--patch",
        type=int,
        default=16,
        help="16, 64, 128 or 160, for 1K, 4K, 8K or 10K pixels (default 16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the new tensors (default 0)")

    def run(args: argparse.Namespace) -> None:
        from ..quant.convert import convert

        if not (sources := args.source + args.latent_ckpt_files):
            raise ValueError("give the latent Z-Image, or a trained L2P model, to convert")
        convert(sources, args.output, args.patch, args.seed, progress=True)
        print(args.output)

    parser.set_defaults(run=run, when_stopped="Nothing was changed")


def add_merge(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p merge`."""
    from ..quant.export import DTYPES

    parser = commands.add_parser(
        "merge",
        help="put a trained part over its pixel initialisation, or a LoRA into its model",
        description=(
            "Put what a training saved over the pixel initialisation it started from, or add a LoRA"
            " to its model's weights."
        ),
    )
    parser.add_argument(
        "--trained",
        "--file_a",
        type=Path,
        required=True,
        metavar="FILE",
        help="what the training saved",
    )
    parser.add_argument(
        "--base",
        "--file_b",
        type=Path,
        required=True,
        metavar="FILE",
        help="the pixel initialisation, or the LoRA's model",
    )
    parser.add_argument("-o", "--output", "--file_out", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of all tensors (default: each tensor's own)"
    )
    parser.add_argument(
        "--skip",
        action="append",
        metavar="PATTERN",
        help="leave out trained tensors by name, such as 'layers.0.*'; may be given again",
    )
    parser.add_argument("--strength", type=float, metavar="X", help="of a LoRA (default 1)")

    def run(args: argparse.Namespace) -> None:
        from ..quant.merge import merge

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
    from ..quant.quantize import PRESETS
    from .files.quantization import FORMATS

    parser = commands.add_parser(
        "quantize",
        help="make an INT8, FP8 or 4-bit model, a third of the size or less",
        description=(
            "Write a whole model with its large linears in 8 or 4 bits, in a format that ComfyUI"
            " and this program load as it is. Prints what each tensor lost."
        ),
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        default="int8_tensorwise",
        help=(
            "default int8_tensorwise; this program computes in INT8 and multiplies the others out,"
            " ComfyUI computes in FP8 on RTX 40 and newer, in mxfp8 and nvfp4 (4 bits) on RTX 50"
            " and newer"
        ),
    )
    parser.add_argument(
        "--granularity",
        choices=FORMATS["int8_tensorwise"].granularities,
        help=(
            "of INT8: a scale for each row (default), for each tensor, or for each row after a"
            " rotation that spreads outliers"
        ),
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="card",
        help=(
            "card: the linears of all main layers but the first; small: of all blocks (default"
            " card)"
        ),
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help=(
            "quantize these too, by ComfyUI's names, such as 'layers.0.*.w1.weight'; may be given"
            " again"
        ),
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="keep these in BF16"
    )
    parser.add_argument(
        "--prefix", default="model.diffusion_model.", help="default model.diffusion_model."
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
        from ..quant.quantize import Options, quantize, save_report, table

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
    from ..quant.export import DTYPES, PREFIXES

    parser = commands.add_parser(
        "export",
        help="write a model under other names, in another dtype",
        description=(
            "Write an L2P model or a trained part under other names or in another dtype. "
            "INT8 stays INT8 unless --dtype multiplies it out."
        ),
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--naming",
        choices=PREFIXES,
        default="comfyui",
        help="T2I-L2P's names, or ComfyUI's with q, k and v packed (default comfyui)",
    )
    parser.add_argument(
        "--prefix", help="default: none for published, model.diffusion_model. for comfyui"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of all tensors (default: each tensor's own)"
    )
    parser.add_argument(
        "--convrot",
        type=int,
        metavar="GROUP",
        help="group size of rotated INT8 weights in a file that does not say so",
    )

    def run(args: argparse.Namespace) -> None:
        from ..quant.export import export

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


def add_synthesize(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p synthesize`."""
    from .train.config import SynthesizeConfig

    parser = commands.add_parser(
        "synthesize",
        help="generate training images with the latent model, and write their prompts",
        description=(
            "Generate images with a latent Z-Image through diffusers, as a folder for l2p train:"
            " images/ and metadata.csv with the seeds. An interrupted run resumes. Under"
            " `accelerate launch` the images are split over the processes."
        ),
    )
    parser.add_argument(
        "prompts",
        nargs="?",
        type=Path,
        metavar="PROMPTS",
        help=(
            ".txt (a prompt a line), .csv, .json or .jsonl with a column prompt or text; with"
            " --write-prompts the .txt to write (default: prompts.txt in the output folder)"
        ),
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="the latent model, such as Z-Image-Turbo; without it only prompts are written",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
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
    parser.add_argument("--device", help="default: the GPU where there is one")
    writing = parser.add_argument_group("prompts")
    writing.add_argument(
        "--write-prompts",
        type=int,
        metavar="N",
        help=(
            "write N prompts first, of 200 to 350 characters, about categories of a taxonomy; the"
            " text encoder writes them as the language model that it is"
        ),
    )
    writing.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="the language model, Qwen3-4B as for l2p generate (default: that of --model)",
    )
    writing.add_argument(
        "--tokenizer", metavar="FOLDER", help="default: tokenizer/ in or beside the text encoder"
    )
    writing.add_argument(
        "--templates", action="store_true", help="write prompts by templates, without a model"
    )
    writing.add_argument(
        "--taxonomy",
        type=Path,
        metavar="FILE",
        help="a text file of categories under '# class' and '## sub-class' (default: our own)",
    )
    writing.add_argument(
        "--prompt-seed",
        type=int,
        default=0,
        metavar="N",
        help="of the order of categories and of what is sampled (default 0)",
    )
    writing.add_argument(
        "--prompt-batch", type=int, default=16, metavar="N", help="prompts at a time (default 16)"
    )

    def run(args: argparse.Namespace) -> None:
        from .batch import check_batch
        from .tables import read_rows
        from .train.synthesize import synthesize

        check_batch(args.batch)
        rank, processes, device = share(args.device)
        if args.prompts is None and not args.write_prompts:
            raise ValueError("give PROMPTS, or let prompts be written: --write-prompts N")
        file = args.prompts or args.output / "prompts.txt"
        if args.write_prompts:
            if processes > 1:
                raise ValueError(
                    "--write-prompts is for one process, and here are"
                    f" {processes}; write the prompts first, then generate without that flag"
                )
            write_prompts(args, file, device)
        if not args.model:
            if not args.write_prompts:
                raise ValueError("--model is not given: the latent model, such as Z-Image-Turbo")
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
            device,
            rank=rank,
            processes=processes,
            progress=rank == 0,
        )
        if rank == 0:
            print(args.output)

    parser.set_defaults(run=run, when_stopped="The same command resumes")


def write_prompts(args: argparse.Namespace, file: Path, device: str) -> None:
    """Write the prompts that `l2p synthesize` asks for."""
    from .train import prompts

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
            " --templates to do without"
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


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p train`."""
    from .train.config import TrainConfig
    from .train.presets import CARDS

    parser = commands.add_parser(
        "train",
        help="train a pixel initialisation, or go on training",
        description=(
            "Train an L2P model on images with captions. The settings come from a TOML file, from"
            " the flags below, which are the file's names, or from both. A run that was stopped"
            " resumes from its last save."
        ),
    )
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="FILE.toml",
        help="the settings; a flag says otherwise",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="say what a step holds in memory, from the checkpoint's header alone",
    )
    parser.add_argument(
        "--memory",
        choices=CARDS,
        help=(
            "choose the settings below that a GPU of so much memory needs, for what is trained: the"
            " published layers, all (freeze ''), or a LoRA; settings that are given stay"
        ),
    )
    parser.add_argument(
        "--stop-at-eof",
        action="store_true",
        help="save and stop when standard input ends, for programs that start this one",
    )
    metavars: dict[object, str] = {int: "N", float: "X", str: "TEXT"}
    for each in fields(TrainConfig):
        choices = each.metadata.get("choices")
        kind: dict[str, Any]
        if each.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif each.type == tuple[str, ...]:
            kind = {"nargs": "*", "metavar": "TEXT"}
        elif each.type == tuple[int, ...]:
            kind = {"nargs": "*", "metavar": "N", "type": int}
        elif choices:
            kind = {"type": each.type, "choices": choices}
        else:
            kind = {"type": each.type, "metavar": metavars[each.type]}
        default = (
            ""
            if "default" in each.metadata["help"] or each.default in ("", (), None)
            else f" (default {each.default})"
        )
        parser.add_argument(
            "--" + each.name.replace("_", "-"),
            default=None,
            help=each.metadata["help"] + default,
            **kind,
        )

    def run(args: argparse.Namespace) -> None:
        from .train.config import read_config
        from .train.run import train

        flags = {
            each.name: value
            for each in fields(TrainConfig)
            if (value := getattr(args, each.name)) is not None
        }
        if args.memory:
            flags["memory"] = args.memory
        if args.estimate:
            from .meter import table
            from .train.estimate import estimate

            print(
                table(
                    estimate(read_config(args.config, {"data": "none", "output": "none", **flags}))
                )
            )
        else:
            if args.stop_at_eof:
                stop_at_eof()
            if (
                args.recipe
            ):  # it may lie in the folder the program runs in; what is installed comes first
                sys.path.append(os.getcwd())
            print(train(read_config(args.config, flags)))

    parser.set_defaults(
        run=run,
        when_stopped="The same command resumes from the last save",
        when_full="docs/training.md, Memory, says which settings take less; --estimate counts them",
    )


if __name__ == "__main__":
    program()
