"""One worker: a process that holds the model and generates what it is sent."""

import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any, Protocol

from PIL import Image

from ..batch import generate_batch
from ..options import PipelineOptions
from .requests import Order

Report = Callable[[int, int, list[Image.Image] | None], None]  # steps done, steps in all, previews


class WorkerDied(Exception):
    """The process ended, or its machine went away. The same work may succeed elsewhere."""


class Cancelled(Exception):
    """Nobody waits for these images any more."""


class Failed(Exception):
    """The images can't be generated; the message says why."""


class Worker(Protocol):
    """What the queue gives its work to."""

    def run(self, orders: list[Order], report: Report) -> list[Image.Image]:
        """Generate a batch. Raises WorkerDied, Cancelled or Failed."""

    def cancel(self) -> None:
        """Stop the batch that runs, at its next step. May be called from any thread."""

    def restart(self) -> None:
        """Make the worker usable after WorkerDied. Raises WorkerDied where that fails."""

    def close(self) -> None:
        """End the worker."""


def generate(
    pipe: Any, orders: list[Order], report: Report, cancelled: Callable[[], bool]
) -> list[Image.Image]:
    """Generate a batch, reporting every step. Raises Cancelled and Failed."""
    import torch

    from ..images import to_images

    previews = orders[0].previews

    def step(done: int, in_all: int, x0: Any) -> None:
        if cancelled():
            raise Cancelled
        shown = to_images(x0) if done in preview_steps(previews, in_all) else None
        report(done, in_all, shown)

    jobs = [order.job for order in orders]
    try:
        return generate_batch(jobs, pipe, pipe.encode_prompt, orders[0].files, step)
    except ValueError as error:
        raise Failed(str(error)) from None
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        raise Failed("out of GPU memory; ask for a smaller image or fewer images") from None


def preview_steps(previews: int, steps: int) -> set[int]:
    """The steps at which to send a preview, evenly spaced."""
    return {round(steps * (number + 1) / (previews + 1)) for number in range(previews)} - {0}


def work(connection: Connection, options: PipelineOptions, device: str) -> None:
    """The worker process: load, then answer orders until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server ends its workers itself
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.showwarning = lambda message, *_: print(f"l2p: note: {message}", file=sys.stderr)
    try:
        try:
            pipe = options.load(device)
        except Exception as error:
            connection.send(("failed", str(error)))
            return
        connection.send(("ready",))
        while True:
            kind, number, *orders = connection.recv()
            if kind == "run":  # a late "cancel" is of a batch that is finished
                connection.send(_answer(connection, pipe, number, *orders))
    except (EOFError, OSError):  # the server is gone
        os._exit(0)


def _answer(connection: Connection, pipe: Any, number: int, orders: list[Order]) -> tuple:
    """Generate the batch of that number, and return what to send last."""

    def cancelled() -> bool:
        while connection.poll():
            if connection.recv() == ("cancel", number):
                return True
        return False

    def report(*progress: Any) -> None:
        connection.send(("progress", *progress))

    try:
        return ("done", generate(pipe, orders, report, cancelled))
    except Cancelled:
        return ("cancelled",)
    except Failed as error:
        return ("failed", str(error))
    except (EOFError, OSError):
        raise
    except Exception:
        traceback.print_exc()
        return ("failed", "the worker failed; the server's log says why")


class ProcessWorker:
    """A worker process on this machine.

    device: "cpu" or "cuda:N". The process is spawned, so CUDA starts afresh in it."""

    def __init__(self, options: PipelineOptions, device: str):
        self.options, self.device = options, device
        self._number, self._sending = 0, Lock()
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, self.options, self.device), daemon=True
        )
        self.process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        """Wait until the model is loaded. Raises WorkerDied or Failed."""
        message = self._receive()
        if message[0] == "failed":
            raise Failed(message[1])

    def run(self, orders: list[Order], report: Report) -> list[Image.Image]:
        """See `Worker`."""
        self._number += 1
        self._send(("run", self._number, orders))
        while True:
            kind, *rest = self._receive()
            if kind == "progress":
                report(*rest)
            elif kind == "done":
                return rest[0]
            elif kind == "cancelled":
                raise Cancelled
            else:
                raise Failed(rest[0])

    def cancel(self) -> None:
        """See `Worker`."""
        try:
            self._send(("cancel", self._number))
        except WorkerDied:
            pass

    def restart(self) -> None:
        """See `Worker`."""
        self.close()
        self._start()
        try:
            self.wait_until_ready()
        except Failed as error:
            raise WorkerDied(str(error)) from None

    def close(self) -> None:
        """See `Worker`."""
        self.process.kill()
        self.process.join()
        self._connection.close()

    def _send(self, message: object) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            raise WorkerDied from None

    def _receive(self) -> tuple:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            raise WorkerDied from None
