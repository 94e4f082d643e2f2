"""The program `l2p`: its parser, and how it ends. The commands are in `commands/`.

Only light modules are imported here. torch takes seconds to import: `main` imports it once it can
answer an interrupt."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import warnings
from io import TextIOWrapper
from typing import Any

from .commands.distill import add_distill
from .commands.doctor import add_doctor
from .commands.files import add_convert, add_export, add_inspect, add_merge, add_quantize
from .commands.generate import add_generate
from .commands.serve import add_serve
from .commands.servers import add_queue
from .commands.synthesize import add_synthesize
from .commands.train import add_train
from .evaluate.command import add_evaluate
from .files.content import printable
from .files.header import CheckpointError
from .interrupt import STATUS, Terminated, ending_at_once


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
            " the INT8 checkpoint; --estimate prints the peak memory of each"
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
    add_distill(commands)
    return parser


if __name__ == "__main__":
    program()
