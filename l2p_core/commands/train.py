"""The command `l2p train`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Container
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..interrupt import stop_at_eof

if TYPE_CHECKING:
    from ..train.config import TrainConfig


def add_train(commands: argparse._SubParsersAction) -> None:
    """Add the command `l2p train`."""
    from ..train.config import TrainConfig
    from ..train.presets import CARDS

    parser = commands.add_parser(
        "train",
        help="train a pixel initialisation, or resume a run",
        description=(
            "Train an L2P model on images with captions. Settings come from a TOML file, from the"
            " flags below (with the same names), or from both. The same command resumes an"
            " interrupted run from its last save."
        ),
    )
    parser.add_argument(
        "config",
        nargs="?",
        type=Path,
        metavar="FILE.toml",
        help="the settings; flags override them",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="print the peak memory of a step, from the checkpoint's header alone; train nothing",
    )
    parser.add_argument(
        "--memory",
        choices=CARDS,
        help=(
            "choose settings with which the training of the published layers, of all layers"
            " (freeze '') or of a LoRA fits a GPU with this much memory; settings that you give"
            " override them"
        ),
    )
    parser.add_argument(
        "--stop-at-eof",
        action="store_true",
        help="save and stop when standard input ends; for programs that start l2p train",
    )
    add_knobs(parser, TrainConfig)

    def run(args: argparse.Namespace) -> None:
        from ..train.config import read_config
        from ..train.run import train

        flags = given_knobs(args, TrainConfig)
        if args.memory:
            flags["memory"] = args.memory
        if args.estimate:
            from ..meter import table
            from ..train.estimate import estimate

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


def add_knobs(
    parser: argparse.ArgumentParser, config: type[TrainConfig], without: Container[str] = ()
) -> None:
    """Add a flag for each setting of a run but those `without`. None is given by default."""
    metavars: dict[object, str] = {int: "N", float: "X", str: "TEXT"}
    for each in fields(config):
        if each.name in without:
            continue
        choices = each.metadata.get("choices")
        kind: dict[str, Any]
        if each.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif each.type == tuple[str, ...]:
            kind = {"nargs": "*", "metavar": "TEXT"}
        elif each.type == tuple[int, ...]:
            kind = {"nargs": "*", "metavar": "N", "type": int}
        elif choices:
            # The settings check the value themselves, and say more than argparse.
            kind = {"type": each.type, "metavar": "{" + ",".join(choices) + "}"}
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


def given_knobs(args: argparse.Namespace, config: type[TrainConfig]) -> dict[str, Any]:
    """Return the settings that flags of `add_knobs` gave."""
    values = {each.name: getattr(args, each.name, None) for each in fields(config)}
    return {name: value for name, value in values.items() if value is not None}
