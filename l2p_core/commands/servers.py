"""The command `l2p queue`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..remote.workflow import PLACES
from ..settings import FIELDS
from .arguments import add_output, add_overwrite, add_settings


def add_queue(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p queue`."""
    parser = commands.add_parser(
        "queue",
        help="run a workflow on ComfyUI servers, with many prompts",
        description=(
            "Send a workflow to one or several ComfyUI servers with these values filled in, and"
            " fetch the images. A value is set on the inputs of that name. If several inputs have"
            " the same value in the workflow, all of them are set. The same command resumes an"
            " interrupted run: images that exist with the same settings are kept."
        ),
    )
    parser.add_argument(
        "workflow",
        type=Path,
        metavar="WORKFLOW.json",
        help="workflow in API format (in ComfyUI: Workflow > Export (API))",
    )
    parser.add_argument(
        "--server",
        action="append",
        metavar="URL",
        help=(
            "address of a ComfyUI server; may be repeated, and an idle server then takes the next"
            " image (default http://127.0.0.1:8188)"
        ),
    )
    add_output(parser)
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="SECONDS",
        help="how long to wait for a server that does not answer or restarts (default 600)",
    )
    add_overwrite(parser)
    image = parser.add_argument_group(
        "image", "settings that are not given keep the workflow's values"
    )
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
        help="images for each prompt; each further image adds 1 to the seed (default 1)",
    )
    image.add_argument("--model", metavar="NAME", help="checkpoint, as the server lists it")
    image.add_argument("--text-encoder", metavar="NAME", help="as the server lists it")
    image.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NODE.INPUT=VALUE",
        help="any other input; NODE is the node's id, title or class; may be repeated",
    )

    def run(args: argparse.Namespace) -> None:
        from ..remote.queue import queue

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
        when_stopped="This run's jobs were removed from the servers; the same command resumes",
    )
