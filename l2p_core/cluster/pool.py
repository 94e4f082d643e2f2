"""Work → actors of a Ray cluster, whoever is idle; again where one dies."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import torch

from .slots import Slot

TRIES = 3  # work that takes its actor down this often ends the run
POLL = 2.0  # seconds between two looks at what machines there are

Work = TypeVar("Work")


class Worker(Protocol):
    """What an actor does."""

    def start(self) -> None:
        """Load what is needed."""

    def run(self, *sent: Any) -> Any:
        """Do one piece of the work. It may be done again after a failure elsewhere."""


class Pool(Generic[Work]):
    """Actors of a cluster, one in each slot: machines may come and go.

    worker: the class of what they do. arguments: to build one. pack: piece of work → what `run` of
    an actor takes, made when an actor is idle."""

    def __init__(
        self,
        slot: Slot,
        worker: type[Worker],
        arguments: tuple,
        pack: Callable[[Work], tuple],
    ):
        import ray

        self._slot, self._arguments, self._pack = slot, arguments, pack
        self._worker: Any = ray.remote(**slot.options)(worker)
        self._idle: list[Any] = []
        # What each actor does, by Ray's reference to the result; None while it starts.
        self._busy: dict[Any, tuple[Any, Work | None]] = {}

    def run(self, work: list[Work]) -> Iterator[tuple[Work, Any]]:
        """Yield each piece of the work with its result, in the order in which they are done.

        Work that was on a machine that died is done again first, elsewhere. Raises ValueError with
        a sentence where an actor meets bad input, or where work takes down actor after actor."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        waiting = deque(work)
        deaths: list[Work] = []
        while waiting or self._running:
            while waiting and self._idle:
                self._give(self._idle.pop(), waiting.popleft())
            self._start(len(waiting))
            for reference in self._done():
                actor, piece = self._busy.pop(reference)
                try:
                    result = ray.get(reference)
                except RayActorError:
                    with suppress(Exception):
                        ray.kill(actor)  # it may only be out of reach
                    print("l2p: a worker of the cluster died; another takes over", file=sys.stderr)
                    if piece is not None:
                        deaths.append(piece)
                        waiting.appendleft(piece)
                    if piece is not None and deaths.count(piece) >= TRIES:
                        raise ValueError(
                            f"{TRIES} workers died one after another at the same images. They may"
                            " have run out of memory: try a smaller --batch or size"
                        ) from None
                    continue
                except RayTaskError as error:
                    raise as_sentence(error) from None
                self._idle.append(actor)
                if piece is not None:
                    yield piece, result

    def close(self) -> None:
        """End all actors."""
        import ray

        for actor in (*self._idle, *(actor for actor, _ in self._busy.values())):
            with suppress(Exception):
                ray.kill(actor)

    @property
    def _running(self) -> bool:
        return any(piece is not None for _, piece in self._busy.values())

    def _done(self) -> list[Any]:
        """Wait for actors; return the references to what they have done."""
        import ray

        if self._busy:
            return ray.wait(list(self._busy), timeout=POLL)[0]
        print("l2p: the cluster has no machine left; waiting for one", file=sys.stderr)
        while self._slot.count() < 1:
            time.sleep(POLL)
        return []

    def _give(self, actor: Any, piece: Work) -> None:
        self._busy[actor.run.remote(*self._pack(piece))] = actor, piece

    def _start(self, waiting: int) -> None:
        """Start actors for what waits, as far as the cluster has room for them."""
        starting = sum(piece is None for _, piece in self._busy.values())
        for _ in range(min(waiting - starting, self._slot.count() - len(self._busy))):
            actor = self._worker.remote(*self._arguments)
            self._busy[actor.start.remote()] = actor, None


def as_sentence(error: Any) -> Exception:
    """Return what to raise for an error in an actor: a sentence with its machine where that is
    what the error is, else the error with its traceback."""
    cause = error.cause
    if isinstance(cause, torch.OutOfMemoryError):
        return cause
    if isinstance(cause, ValueError | OSError | ImportError):
        return ValueError(f"{cause} (on {error.ip})")
    return error
