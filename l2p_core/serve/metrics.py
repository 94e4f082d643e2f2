"""What /metrics tells Prometheus."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from .dispatch import Dispatcher

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """The counters of one dispatcher."""

    def __init__(self, dispatcher: "Dispatcher"):
        self.registry = registry = CollectorRegistry()
        waiting = Gauge("l2p_queue_length", "Images that wait", registry=registry)
        waiting.set_function(lambda: dispatcher.waiting)
        running = Gauge("l2p_images_running", "Images being generated", registry=registry)
        running.set_function(lambda: dispatcher.running)
        available = Gauge("l2p_workers_available", "Workers that are up", registry=registry)
        available.set_function(lambda: dispatcher.available)
        self.seconds = Histogram(
            "l2p_image_seconds",
            "Seconds an image, without waiting",
            registry=registry,
            buckets=SECONDS,
        )
        self.failures = Counter("l2p_failures", "Images that failed", registry=registry)
        self.cancelled = Counter("l2p_cancelled", "Images cancelled", registry=registry)
        self.rejected = Counter(
            "l2p_rejected", "Requests turned away by a full queue", registry=registry
        )
        self.restarts = Counter("l2p_worker_restarts", "Workers restarted", registry=registry)

    def text(self) -> bytes:
        """Return all of them in Prometheus's text format."""
        return generate_latest(self.registry)
