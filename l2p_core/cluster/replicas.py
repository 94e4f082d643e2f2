"""Workers of `l2p serve` on a Ray cluster: replicas of a Ray Serve deployment.

The web page, the API and the queue stay in one process, as without Ray. Ray Serve keeps the
replicas: it starts them, checks their health, replaces those that die and follows the load."""

import asyncio
import concurrent.futures
import logging
import secrets
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from threading import Event
from typing import Any

from PIL import Image

from ..options import PipelineOptions
from ..serve.requests import Order
from ..serve.worker import Cancelled, Failed, Report, Worker, WorkerDied, generate
from .slots import Slot

HEALTH_SECONDS = 5.0  # between two checks of a replica
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)


class Replica:
    """One model on one GPU."""

    def __init__(self, options: PipelineOptions, slot: Slot):
        self._pipe = options.load(slot.device())

    async def run(self, orders: list[Order]) -> AsyncIterator[tuple]:
        """Generate a batch; yields "progress" for each step, then "done" or "failed".

        The model computes in a thread, so that this one answers health checks and cancels."""
        events: asyncio.Queue[tuple] = asyncio.Queue()
        loop, cancelled = asyncio.get_running_loop(), Event()

        def send(*event: Any) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                report = partial(send, "progress")
                send("done", generate(self._pipe, orders, report, cancelled.is_set))
            except Cancelled:
                send("cancelled")
            except Failed as error:
                send("failed", str(error))
            except Exception:
                traceback.print_exc()
                send("failed", "the worker failed; Ray's logs say why")

        running = loop.run_in_executor(None, work)
        try:
            while True:
                event = await events.get()
                yield event
                if event[0] != "progress":
                    return
        finally:
            cancelled.set()
            await asyncio.shield(running)  # the next batch waits until this one has stopped


class RayWorker:
    """A place in the queue's work that any replica may take; see `serve.worker.Worker`."""

    def __init__(self, handle: Any, running: Callable[[], int]):
        """running: how many replicas are up."""
        self._handle, self._running = handle.options(stream=True), running
        self._answer: Any = None

    def run(self, orders: list[Order], report: Report) -> list[Image.Image]:
        """See `Worker`."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        self._answer = self._handle.run.remote(orders)
        try:
            for kind, *rest in self._answer:
                if kind == "progress":
                    report(*rest)
                elif kind == "done":
                    return rest[0]
                elif kind == "failed":
                    raise Failed(rest[0])
                else:
                    raise Cancelled
        except (*CANCELLED, RayError, RayServeException) as error:
            if self._answer is None:  # see `cancel`
                raise Cancelled from None
            raise WorkerDied(str(error)) from None
        raise WorkerDied("the answer ended early")

    def cancel(self) -> None:
        """See `Worker`."""
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.cancel()

    def restart(self) -> None:
        """See `Worker`. Ray Serve replaces a replica itself; another may be up already."""
        if not self._running():
            raise WorkerDied("no replica is up")

    def close(self) -> None:
        """See `Worker`."""
        self.cancel()


@contextmanager
def replicas(
    options: PipelineOptions, slot: Slot, least: int | None, most: int | None
) -> Iterator[list[Worker]]:
    """Start replicas, `least` of them and up to `most` under load, and end them with the block.

    Yields one worker for each that there may be, once the first replicas are up. None for as many
    as the cluster has room for. Raises ValueError where they can't start."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, ProxyLocation

    most = slot.count() if most is None else most
    least = most if least is None else least
    if not 1 <= least <= most:
        raise ValueError(
            f"--min-replicas is {least} and --max-replicas {most}; expected 1 or more, and the"
            " first not above the second"
        )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location=ProxyLocation.Disabled)  # this process answers HTTP itself
    deployment: Any = serve.deployment(
        max_ongoing_requests=1,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=6 * HEALTH_SECONDS,
        graceful_shutdown_timeout_s=1,
        autoscaling_config=AutoscalingConfig(
            min_replicas=least,
            initial_replicas=least,
            max_replicas=most,
            target_ongoing_requests=1,
            upscale_delay_s=2,
        ),
        ray_actor_options=slot.options,
    )(Replica)
    name = f"l2p-{secrets.token_hex(4)}"  # another server may use the same cluster
    application = deployment.bind(replace(options, threads=slot.threads), slot)
    try:
        try:
            handle = serve.run(application, name=name, route_prefix=None)
        except RuntimeError as error:
            raise ValueError(f"Ray Serve can't start the model: {str(error).strip()}") from None
        yield [RayWorker(handle, partial(running_replicas, name)) for _ in range(most)]
    finally:
        with suppress(Exception):
            serve.delete(name, _blocking=False)


def running_replicas(name: str) -> int:
    """How many replicas of an application are up."""
    from ray import serve

    application = serve.status().applications.get(name)
    deployments: Any = application.deployments if application else {}
    return sum(each.replica_states.get("RUNNING", 0) for each in deployments.values())
