"""The command `l2p doctor`."""

from __future__ import annotations

import argparse


def add_doctor(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="test this installation, or a checkpoint and its text encoder",
        description=(
            "Without a checkpoint: report what is installed, compare an image of the bundled"
            " model with a recorded one, and test that the model denoises. With a checkpoint:"
            " compare its tensors with the published files, and test that it denoises an image"
            " better than baselines that need no model. The report names each fault. The exit"
            " status is 1 if any test fails."
        ),
    )
    parser.add_argument("--checkpoint", metavar="PATH", help="file, index or folder of shards")
    parser.add_argument("--text-encoder", metavar="PATH", help="as for l2p generate")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="as for l2p generate")
    parser.add_argument(
        "--device", help="device to compute on (default: the accelerator, if there is one)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--convrot", type=int, metavar="GROUP", help="as for l2p generate")
    parser.add_argument(
        "--image",
        metavar="FILE",
        help="denoise this image (default: a scene that the program renders)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="prompt that describes the image")
    parser.add_argument(
        "--compare",
        metavar="PATH",
        help="a second checkpoint of the same model, such as its INT8 form",
    )

    def run(args: argparse.Namespace) -> int:
        import torch

        from ..doctor import examine, verdict

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
