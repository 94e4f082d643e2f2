"""Requests → images: what page and API share."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from threading import Event as Flag
from typing import Any

from ..batch import image_record
from ..files.header import hash_files
from ..images import write_png
from ..pipeline import BUNDLED_MODEL, L2PPipeline
from ..text import encoder_files
from .dispatch import Dispatcher, Done, Event, Failure, Task
from .requests import Limits, Order, make_orders

PLACE_SECONDS = 0.5  # how often to look for the place in the queue


@dataclass(frozen=True)
class Waiting:
    """A request's images wait. place: of the first of them, 1 for the next; 0 where none waits."""

    place: int


class Service:
    """A checkpoint served by a dispatcher's workers.

    pipe: opened only for its header; it generates nothing itself."""

    def __init__(self, pipe: L2PPipeline, dispatcher: Dispatcher, limits: Limits):
        self.pipe, self.dispatcher, self.limits = pipe, dispatcher, limits
        file = pipe.layout.path
        self.bundled = file.parent == BUNDLED_MODEL
        self.model_name = "bundled" if self.bundled else file.name.removesuffix(".safetensors")
        self._stop = Flag()
        beside = ThreadPoolExecutor(1)
        self._checkpoint_hash = beside.submit(hash_files, pipe.layout.files, self._stop)
        self._encoder_hash = beside.submit(
            hash_files, encoder_files(pipe.text_encoder_path), self._stop
        )
        beside.shutdown(wait=False)

    async def orders(
        self, request: Any, image: bytes | None = None, mask: bytes | None = None
    ) -> list[Order]:
        """See `make_orders`. Decoding an image takes a while, so it is done in a thread."""
        return await asyncio.to_thread(make_orders, request, self.pipe, self.limits, image, mask)

    def submit(self, orders: list[Order]) -> "Ticket":
        """Queue the images of a request. Raises QueueFull."""
        return Ticket(self.dispatcher, orders)

    async def png(self, order: Order, done: Done) -> bytes:
        """The image as a PNG with its settings, as `l2p generate` writes it."""
        return await asyncio.to_thread(self._png, order, done)

    def _png(self, order: Order, done: Done) -> bytes:
        record = image_record(
            order.job,
            self.pipe,
            done.batch,
            self._checkpoint_hash.result(),
            self._encoder_hash.result(),
            order.input_hashes,
            [],
        )
        stream = BytesIO()
        write_png(done.image, stream, record)
        return stream.getvalue()

    def close(self) -> None:
        """End the workers."""
        self._stop.set()
        self.dispatcher.close()


class Ticket:
    """The images of one request, in the queue or being generated."""

    def __init__(self, dispatcher: Dispatcher, orders: list[Order]):
        loop = asyncio.get_running_loop()
        self._dispatcher = dispatcher
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def notify(number: int, event: Event) -> None:
            try:
                loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
            except RuntimeError:  # the server is stopping: its loop is closed
                pass

        self.tasks = [Task(order, partial(notify, number)) for number, order in enumerate(orders)]
        dispatcher.submit(self.tasks)

    async def events(self) -> AsyncGenerator[tuple[int, Event | Waiting], None]:
        """Each image's number with what happens to it, until all are done or failed; and the place
        in the queue of the first that waits, whenever it changes.

        Closing the iterator cancels what is not done."""
        left, place = len(self.tasks), 0
        try:
            while left:
                if place != (place := self.place()):
                    yield 0, Waiting(place)
                try:
                    number, event = await asyncio.wait_for(self._events.get(), PLACE_SECONDS)
                except asyncio.TimeoutError:
                    continue
                left -= isinstance(event, Done | Failure)
                yield number, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Cancel what is not done."""
        self._dispatcher.cancel(self.tasks)

    def place(self) -> int:
        """The place in the queue of the first image that waits; 0 where none does."""
        places = [self._dispatcher.place(task) for task in self.tasks]
        return min((place for place in places if place), default=0)
