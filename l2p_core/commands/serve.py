"""The command `l2p serve`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import (
    add_checkpoint,
    add_pipeline,
    add_ray,
    check_ray,
    pipeline_arguments,
    print_bundled,
    require,
)


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
        help="address to listen on; 0.0.0.0 for all, which needs an API key (default 127.0.0.1)",
    )
    network.add_argument(
        "--port",
        type=int,
        default=23231,
        metavar="N",
        help="port to listen on; 0 for any free port (default 23231)",
    )
    network.add_argument(
        "--api-key",
        metavar="KEY",
        help=(
            "key of the page and the API. Every user of this machine can read it in the list of"
            " processes, so prefer --api-key-file or the environment variable L2P_API_KEY, which"
            " is the default"
        ),
    )
    network.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="a file that holds the API key"
    )
    network.add_argument(
        "--no-auth",
        action="store_true",
        help="let everyone who can reach the address use the server without a key",
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
    add_ray(machine, collect=False)
    for name, help in (
        (
            "min",
            "with --ray: smallest number of model processes (default: that of --max-replicas)",
        ),
        ("max", "with --ray: largest number of model processes (default: one for each GPU)"),
    ):
        machine.add_argument(f"--{name}-replicas", type=int, metavar="N", help=help)
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="largest height and width (default: twice the trained resolution)",
    )
    for name, default, help in (
        ("steps", 100, "maximum number of steps"),
        ("images", 10, "maximum number of images in a request"),
        ("queue", 200, "maximum number of waiting images"),
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
        check_ray(args)
        from ..options import PipelineOptions
        from ..serve.run import ServeOptions, read_gpus, read_key, serve

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
            ray=args.ray,
            min_replicas=args.min_replicas,
            max_replicas=args.max_replicas,
        )
        if args.checkpoint is None:
            print_bundled()
        serve(options, PipelineOptions(pipeline_arguments(args), batch=args.batch))

    parser.set_defaults(run=run, when_stopped="Images that are not finished are lost")
