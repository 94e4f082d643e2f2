"""The command `l2p distill`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .train import add_knobs, given_knobs


def add_distill(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p distill`."""
    from ..train.distill_config import UNUSED, DistillConfig
    from ..train.presets import CARDS

    parser = commands.add_parser(
        "distill",
        help="make a checkpoint that needs fewer passes, from prompts alone",
        description=(
            "Train a student that generates in few steps and without guidance what its teacher, the"
            " checkpoint, generates in many steps with guidance. It needs prompts and no images."
            " Settings come from a TOML file, from the flags below, or from both. The same command"
            " resumes an interrupted run."
        ),
    )
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="FILE.toml",
        help="the settings; a flag overrides them",
    )
    parser.add_argument(
        "--memory",
        choices=CARDS,
        help="choose settings that fit a GPU with this much memory, as for l2p train",
    )
    add_knobs(parser, DistillConfig, without=UNUSED)

    def run(args: argparse.Namespace) -> None:
        from ..train.config import read_config_of
        from ..train.distill import distill

        flags = given_knobs(args, DistillConfig)
        if args.memory:
            flags["memory"] = args.memory
        print(distill(read_config_of(DistillConfig, args.config, flags)))

    parser.set_defaults(
        run=run,
        when_stopped="The same command resumes from the last save",
        when_full="docs/training.md, Memory, says which settings take less",
    )
