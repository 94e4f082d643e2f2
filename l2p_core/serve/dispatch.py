"""One first-come queue over all workers."""

import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread

from PIL import Image

from .metrics import Metrics
from .requests import Order, held_bytes
from .worker import Cancelled, Failed, Worker, WorkerDied

TRIES = 3  # an image that takes its worker down this often fails
RESTART_PAUSE = 5.0  # seconds between attempts to restart a worker


class QueueFull(Exception):
    """No more images may wait."""


@dataclass(frozen=True)
class Progress:
    """A step is done. preview: the x0 prediction, at some steps."""

    step: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Done:
    """The image is there. batch: how many were generated together."""

    image: Image.Image
    batch: int


@dataclass(frozen=True)
class Failure:
    """The image can't be generated."""

    message: str


Event = Progress | Done | Failure


class Task:
    """One image that a client waits for. notify: called from another thread with each event."""

    def __init__(self, order: Order, notify: Callable[[Event], None]):
        self.order, self.notify = order, notify
        self.tries, self.cancelled = 0, False


class Dispatcher:
    """Gives the task that came first to the worker that is idle first.

    longest: tasks that may wait. most_bytes: of decoded uploads that may wait. batch: tasks of
    equal settings that one worker takes at once. A worker that dies is restarted, and its tasks go
    back to the front of the queue."""

    def __init__(self, workers: list[Worker], longest: int, most_bytes: int, batch: int = 1):
        self.workers, self.batch = workers, batch
        self.longest, self.most_bytes = longest, most_bytes
        self.metrics = Metrics(self)
        self.available = len(workers)
        self._waiting: deque[Task] = deque()
        self._groups: dict[Worker, list[Task]] = {}  # what each worker generates now
        self._changed = Condition()
        self._closed = False
        self._threads = [
            Thread(target=self._serve, args=(worker,), daemon=True) for worker in workers
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """How many tasks wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many tasks are being generated."""
        return sum(map(len, list(self._groups.values())))

    def submit(self, tasks: list[Task]) -> None:
        """Queue the tasks of one request, all or none. Raises QueueFull."""
        with self._changed:
            all_waiting = [*self._waiting, *tasks]
            size = held_bytes([task.order for task in all_waiting])
            if len(all_waiting) > self.longest or size > self.most_bytes:
                self.metrics.rejected.inc()
                raise QueueFull
            self._waiting.extend(tasks)
            self._changed.notify_all()

    def cancel(self, tasks: list[Task]) -> None:
        """Forget tasks that wait, and stop those that run at their next step."""
        with self._changed:
            for task in tasks:
                task.cancelled = True
                if task in self._waiting:
                    self._waiting.remove(task)
                    self.metrics.cancelled.inc()
            for worker, group in self._groups.items():
                if all(task.cancelled for task in group) and set(group) & set(tasks):
                    worker.cancel()

    def place(self, task: Task) -> int:
        """A task's place in the queue, 1 for the next; 0 where it does not wait."""
        with self._changed:
            return self._waiting.index(task) + 1 if task in self._waiting else 0

    def close(self) -> None:
        """End all workers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for worker in self.workers:
            worker.close()
        for thread in self._threads:
            thread.join(10)

    def _serve(self, worker: Worker) -> None:
        """One worker's thread."""
        while group := self._take(worker):
            started = time.monotonic()
            try:
                images = worker.run([task.order for task in group], _reporter(worker, group))
            except WorkerDied:
                self._give_back(worker, group)
                self._restart(worker)
                continue
            except Cancelled:
                self._finish(worker)
                self.metrics.cancelled.inc(len(group))
                continue
            except Failed as error:
                self._finish(worker)
                self._fail(group, str(error))
                continue
            self._finish(worker)
            for task, image in zip(group, images, strict=True):
                self.metrics.seconds.observe((time.monotonic() - started) / len(group))
                task.notify(Done(image, len(group)))

    def _take(self, worker: Worker) -> list[Task]:
        """Wait for the next task, and take those behind it that fit in one batch with it; empty
        when the queue is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            group = [self._waiting.popleft()]
            while (
                len(group) < self.batch
                and self._waiting
                and fit_together(group[0].order, self._waiting[0].order)
            ):
                group.append(self._waiting.popleft())
            self._groups[worker] = group
            return group

    def _finish(self, worker: Worker) -> None:
        with self._changed:
            del self._groups[worker]

    def _give_back(self, worker: Worker, group: list[Task]) -> None:
        """Put a dead worker's tasks back to the front of the queue, or fail those that took down
        too many."""
        with self._changed:
            del self._groups[worker]
            for task in group:
                task.tries += 1
            again = [task for task in group if task.tries < TRIES and not task.cancelled]
            self._waiting.extendleft(reversed(again))
            self._changed.notify_all()
        self._fail(
            [task for task in group if task not in again and not task.cancelled],
            f"the worker died {TRIES} times while it generated this image",
        )

    def _fail(self, group: list[Task], message: str) -> None:
        self.metrics.failures.inc(len(group))
        for task in group:
            task.notify(Failure(message))

    def _restart(self, worker: Worker) -> None:
        """Restart a worker, until that succeeds or the queue is closed."""
        with self._changed:
            self.available -= 1
        while not self._closed:
            print("l2p: a worker died; restarting it", file=sys.stderr)
            self.metrics.restarts.inc()
            try:
                worker.restart()
                break
            except WorkerDied:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, RESTART_PAUSE)
        with self._changed:
            self.available += 1
        if self._closed:
            worker.close()


def fit_together(first: Order, second: Order) -> bool:
    """Whether two images can be generated in one batch: all but prompt and seed is equal."""
    return (
        first.job.shared == second.job.shared
        and first.previews == second.previews
        and first.input_hashes == second.input_hashes
    )


def _reporter(
    worker: Worker, group: list[Task]
) -> Callable[[int, int, list[Image.Image] | None], None]:
    """What a worker calls at each step of the group's images."""

    def report(step: int, steps: int, previews: list[Image.Image] | None) -> None:
        if all(task.cancelled for task in group):  # a first cancel may have come too early
            worker.cancel()
        for number, task in enumerate(group):
            preview = previews[number] if previews else None
            task.notify(Progress(step, steps, preview))

    return report
