"""The queue of `l2p serve`, with workers that generate nothing."""

import threading

import pytest
from serving import MISSING

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} come with the extra serve")
if not MISSING:
    from comfyui_l2p.l2p_core.batch import Job
    from comfyui_l2p.l2p_core.serve.dispatch import (
        TRIES,
        Dispatcher,
        Done,
        Failure,
        QueueFull,
        Task,
    )
    from comfyui_l2p.l2p_core.serve.requests import NO_FILE, Order
    from comfyui_l2p.l2p_core.serve.worker import Cancelled, Failed, WorkerDied
    from comfyui_l2p.l2p_core.settings import CompleteSettings

SECONDS = 30


class StandIn:
    """A worker whose images are their seeds. It waits for `go`, and dies at the seeds in
    `deadly`."""

    def __init__(self, deadly=()):
        self.deadly, self.taken, self.restarts = deadly, [], 0
        self.go, self.busy, self.stopped = (threading.Event() for _ in range(3))

    def run(self, orders, report):
        seeds = [order.job.settings.seed for order in orders]
        self.taken.append(seeds)
        self.busy.set()
        assert self.go.wait(SECONDS)
        if self.stopped.is_set():
            self.stopped.clear()
            raise Cancelled
        if 666 in seeds:
            raise Failed("no such image")
        if set(seeds) & set(self.deadly):
            raise WorkerDied
        report(1, 1, None)
        return seeds

    def cancel(self):
        self.stopped.set()
        self.go.set()

    def restart(self):
        self.restarts += 1
        if self.restarts == 1 and self.deadly:
            raise WorkerDied  # the first attempt fails

    def close(self):
        self.go.set()


class Client:
    """Waits for images; `ends` are the last events of each, by seed, in the order they came."""

    def __init__(self, queue):
        self.queue, self.ends, self.came = queue, {}, threading.Condition()

    def ask(self, *seeds, steps=1):
        tasks = [self.task(seed, steps) for seed in seeds]
        self.queue.submit(tasks)
        return tasks

    def task(self, seed, steps):
        settings = CompleteSettings(
            seed=seed, height=96, width=96, num_inference_steps=steps, cfg_scale=1.0
        )
        return Task(Order(Job(NO_FILE, settings, "")), lambda event: self.note(seed, event))

    def note(self, seed, event):
        with self.came:
            if isinstance(event, Done | Failure):
                assert seed not in self.ends  # once each
                self.ends[seed] = event
            self.came.notify_all()

    def wait(self, count):
        with self.came:
            assert self.came.wait_for(lambda: len(self.ends) == count, SECONDS)


@pytest.fixture
def queue_of(monkeypatch):
    """Builds a queue of these workers."""
    monkeypatch.setattr("comfyui_l2p.l2p_core.serve.dispatch.RESTART_PAUSE", 0.01)
    queues = []

    def build(*workers, longest=20, batch=1):
        queues.append(Dispatcher(list(workers), longest, 10**9, batch))
        return queues[-1]

    yield build
    for queue in queues:
        queue.close()


def test_who_comes_first_is_served_first(queue_of):
    worker = StandIn()
    queue = queue_of(worker)
    first, second = Client(queue), Client(queue)
    first.ask(1, 2)
    second.ask(3)
    waiting = first.ask(4)
    worker.busy.wait(SECONDS)
    assert queue.place(waiting[0]) == 3 and queue.waiting == 3 and queue.running == 1
    worker.go.set()
    first.wait(3)
    second.wait(1)
    assert worker.taken == [[1], [2], [3], [4]]


def test_images_of_equal_settings_are_batched_in_order(queue_of):
    worker = StandIn()
    client = Client(queue_of(worker, batch=2))
    client.ask(1)
    worker.busy.wait(SECONDS)
    client.ask(2, 3, 4)
    client.ask(5, steps=9)
    worker.go.set()
    client.wait(5)
    assert worker.taken == [[1], [2, 3], [4], [5]]


def test_a_worker_that_dies_is_restarted_and_its_image_fails_after_three_times(queue_of):
    worker = StandIn(deadly=[7])
    queue = queue_of(worker)
    client = Client(queue)
    client.ask(7, 8)
    worker.go.set()
    client.wait(2)
    assert worker.taken == [[7]] * TRIES + [[8]]
    assert "died 3 times" in client.ends[7].message and client.ends[8] == Done(8, 1)
    assert worker.restarts == TRIES + 1 and queue.available == 1


def test_a_dead_workers_image_comes_before_those_that_wait(queue_of):
    dying, other, down = StandIn(deadly=[1, 2]), StandIn(), threading.Event()
    dying.restart = lambda: down.wait(SECONDS)
    queue = queue_of(dying, other)
    client = Client(queue)
    client.ask(1, 2, 3, 4)
    for worker in (dying, other):
        worker.busy.wait(SECONDS)
    dying.go.set()
    with queue._changed:
        assert queue._changed.wait_for(lambda: queue.waiting == 3, SECONDS)
    other.go.set()
    client.wait(4)
    down.set()
    assert other.taken[1:] == [*dying.taken, [3], [4]]


def test_cancelled_images_are_forgotten_or_stopped(queue_of):
    worker = StandIn()
    queue = queue_of(worker)
    client = Client(queue)
    running, waiting = client.ask(1), client.ask(2)
    client.ask(3)
    worker.busy.wait(SECONDS)
    queue.cancel(waiting)
    queue.cancel(running)
    client.wait(1)
    assert worker.taken == [[1], [3]] and set(client.ends) == {3}


def test_an_image_that_fails_leaves_the_worker_up(queue_of):
    worker = StandIn()
    client = Client(queue_of(worker))
    client.ask(666, 1)
    worker.go.set()
    client.wait(2)
    assert client.ends[666] == Failure("no such image") and worker.restarts == 0


def test_a_request_that_does_not_fit_in_the_queue_is_turned_away_whole(queue_of):
    worker = StandIn()
    queue = queue_of(worker, longest=2)
    client = Client(queue)
    client.ask(1)
    worker.busy.wait(SECONDS)
    client.ask(2)
    with pytest.raises(QueueFull):
        client.ask(3, 4)
    assert queue.waiting == 1
