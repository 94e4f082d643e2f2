"""Interrupts (Ctrl-C) and SIGTERM: what answers them while modules are imported, and while a run
is training."""

import _thread
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread, current_thread, main_thread
from types import FrameType

# Exit statuses by signal number, as shells have them.
STATUS: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
NOTED = b"\nl2p: stopping; the state is saved first. Ctrl-C stops at once, without saving\n"


class Terminated(KeyboardInterrupt):
    """SIGTERM, which asks a program to stop as Ctrl-C does."""


class Noted(Event):
    """Set by the first interrupt or SIGTERM."""

    number: int = signal.SIGINT

    def error(self) -> KeyboardInterrupt:
        """What to raise once everything is saved."""
        return Terminated() if self.number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Within it an interrupt or SIGTERM ends the program at once, with one sentence; after it
    SIGTERM raises Terminated.

    For the import of large libraries. An exception from a signal can't be trusted there: a
    half-imported library may swallow it or turn it into an error of its own. Nothing was written
    yet, so nothing is lost."""

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"l2p: stopped. Nothing was changed\n")
        os._exit(STATUS[number])

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    answers_ctrl_c = (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )  # a background job ignores it
    if answers_ctrl_c:
        signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if answers_ctrl_c:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, terminate)


@contextmanager
def noted() -> Iterator[Noted]:
    """Within it the first interrupt or SIGTERM is only noted, so that the run can save.

    A second interrupt raises KeyboardInterrupt. A second SIGTERM is noted too: a launcher sends
    its own after that of the keyboard."""
    asked = Noted()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not asked.is_set():
            asked.number = number
            os.write(2, NOTED)
        asked.set()

    before = {}
    if current_thread() is main_thread():  # no other may ask for signals
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_at_eof() -> None:
    """Take the end of standard input for SIGTERM, from now on.

    A program that started this one holds the other end of it: its end closes where it asks to
    stop, and also where it is killed. Works on Windows, where no signal can be sent."""

    def watch() -> None:
        # not through sys.stdin, whose lock Python wants where it ends while this thread reads
        while os.read(descriptor, 1 << 16):
            pass
        if hasattr(signal, "pthread_kill"):  # it also ends a wait of the main thread
            signal.pthread_kill(main_thread().ident or 0, signal.SIGTERM)
        else:
            _thread.interrupt_main(signal.SIGTERM)

    descriptor = sys.stdin.fileno()

    Thread(target=watch, name="stop at EOF", daemon=True).start()
