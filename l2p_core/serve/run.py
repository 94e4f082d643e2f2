"""`l2p serve`: workers, page and API put together and started."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..devices import default_device, default_dtype
from ..options import PipelineOptions
from ..pipeline import L2PPipeline
from ..text import encoder_files
from .dispatch import Dispatcher
from .requests import Limits
from .worker import Failed, ProcessWorker, Worker, WorkerDied

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MIN_KEY = 16  # characters


@dataclass(frozen=True)
class ServeOptions:
    """How to serve; what to load is in `PipelineOptions`."""

    host: str = "127.0.0.1"
    port: int = 23231
    gpus: tuple[int, ...] | None = None  # None for all visible ones
    workers: int = 1  # for each GPU, or on the CPU
    batch: int = 1
    key: str | None = None
    no_auth: bool = False
    language: str | None = None  # of the page
    max_side: int | None = None
    max_steps: int = 100
    max_images: int = 10
    max_queue: int = 200
    max_upload_mb: float = 20
    ray: str | None = None  # address of a Ray cluster, see `cluster.connect.connected`
    min_replicas: int | None = None
    max_replicas: int | None = None


def serve(options: ServeOptions, model: PipelineOptions) -> None:
    """Serve until interrupted. Raises ValueError and OSError where that can't start."""
    import torch

    check_exposure(options)
    check_replicas(options)
    if options.ray is not None:
        return serve_on_cluster(options, model, options.ray)
    devices = worker_devices(options)
    with listening(options.host, options.port) as listener:
        pipe = L2PPipeline.from_pretrained(**model.arguments, device="cpu")
        if model.arguments["torch_dtype"] is None:  # each image's record names its worker's dtype
            pipe.dtype = default_dtype(torch.device(devices[0]), pipe.layout.parameters)
        encoder_files(pipe.text_encoder_path)  # raises where there is none
        serve_on(listener, options, pipe, start_workers(devices, model))


def serve_on_cluster(options: ServeOptions, model: PipelineOptions, address: str) -> None:
    """Serve with the workers of a Ray cluster, until interrupted."""
    from ..cluster.connect import connected
    from ..cluster.replicas import replicas
    from ..cluster.slots import find_slot, loaded_bytes

    with listening(options.host, options.port) as listener, connected(address):
        pipe = model.open("cpu")
        slot = find_slot(None, loaded_bytes(pipe))
        if model.arguments["torch_dtype"] is None:
            pipe.dtype = slot.dtype(pipe)
        elsewhere = model.for_another_machine(pipe.dtype)
        least, most = options.min_replicas, options.max_replicas
        with replicas(elsewhere, slot, least, most) as workers:
            serve_on(listener, options, pipe, workers)


def check_replicas(options: ServeOptions) -> None:
    """Raise ValueError for flags that are for a Ray cluster, or not for one."""
    if options.ray is None:
        if options.min_replicas is not None or options.max_replicas is not None:
            raise ValueError("--min-replicas and --max-replicas are for a Ray cluster; give --ray")
    elif options.gpus is not None or options.workers != 1:
        raise ValueError(
            "--gpus and --workers are for one machine. With --ray, give --min-replicas and"
            " --max-replicas"
        )


def serve_on(
    listener: socket.socket, options: ServeOptions, pipe: L2PPipeline, workers: list[Worker]
) -> None:
    """Serve with these workers on a socket, until interrupted. pipe: see `Service`."""
    import uvicorn

    from .api import make_api
    from .guard import Guard
    from .page import add_page
    from .service import Service

    limits = Limits(
        side=options.max_side or 2 * max(pipe.layout.trained_size),
        steps=options.max_steps,
        images=options.max_images,
        queue=options.max_queue,
        upload=int(options.max_upload_mb * 1e6),
    )
    dispatcher = Dispatcher(workers, limits.queue, limits.uploads, options.batch)
    service = Service(pipe, dispatcher, limits)
    app = make_api(service)
    add_page(app, service, options.language)
    local = options.host in LOOPBACK and options.key is None
    guarded = Guard(app, options.key, local, limits.upload)
    config = uvicorn.Config(
        guarded, log_level="warning", access_log=False, timeout_graceful_shutdown=3
    )
    host, port = listener.getsockname()[:2]
    print(f"l2p: serving at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        service.close()


def check_exposure(options: ServeOptions) -> None:
    """Raise ValueError where other machines could use the server without a key."""
    if options.key is not None and len(options.key) < MIN_KEY:
        raise ValueError(
            f"the API key has {len(options.key)} characters; expected at least {MIN_KEY}. Make one:"
            " python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    if options.host not in LOOPBACK and options.key is None and not options.no_auth:
        raise ValueError(
            f"--host {options.host} lets other machines use this server, and there is no API key."
            " Give --api-key-file FILE, set L2P_API_KEY, or say --no-auth"
        )


def read_gpus(text: str | None) -> tuple[int, ...] | None:
    """The numbers in "0,2"; None for none given. Raises ValueError."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"--gpus is {text!r}; expected numbers such as 0,2")
    return tuple(map(int, parts))


def read_key(key: str | None, file: Path | None) -> str | None:
    """The API key: as given, from a file, or from L2P_API_KEY; None where there is none."""
    if key is not None and file is not None:
        raise ValueError("both --api-key and --api-key-file came; give one")
    if file is not None:
        key = file.read_text(encoding="utf-8").strip()
    if key is None:
        key = os.environ.get("L2P_API_KEY")
    if key == "":
        raise ValueError("the API key is empty; give one of 16 characters or more")
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("the API key holds other characters than ASCII letters, digits and signs")
    return key


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there. Taken first, so that a port in use shows before the model is
    loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=512)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"can't listen at {host}, port {port}: {error}. Give another --port"
        ) from None
    try:
        yield listener
    finally:
        listener.close()


def start_workers(devices: list[str], model: PipelineOptions) -> list[Worker]:
    """Start a worker process on each device and wait until all are ready. Raises ValueError."""
    if devices[0] == "cpu" and len(devices) > 1 and not os.environ.get("OMP_NUM_THREADS"):
        model = replace(model, threads=max((os.cpu_count() or 1) // len(devices), 1))
    workers: list[ProcessWorker] = []
    try:
        for device in devices:
            workers.append(ProcessWorker(model, device))
        for worker in workers:
            worker.wait_until_ready()
    except BaseException as error:
        for worker in workers:
            worker.close()
        if isinstance(error, Failed):
            raise ValueError(str(error)) from None
        if isinstance(error, WorkerDied):
            raise ValueError(
                "a worker process ended while it loaded the model; it may have run out of memory"
            ) from None
        raise
    return list(workers)


def worker_devices(options: ServeOptions) -> list[str]:
    """The device of each worker. Raises ValueError for a GPU that is not there."""
    import torch

    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; expected 1 or more")
    kind = default_device().type
    there = 0 if kind == "cpu" else getattr(torch, kind).device_count()
    gpus = tuple(range(there)) if options.gpus is None else options.gpus
    for gpu in gpus:
        if gpu not in range(there):
            raise ValueError(f"--gpus names {gpu}; there are {there}, numbered from 0")
    devices = [f"{kind}:{gpu}" for gpu in gpus] or ["cpu"]
    return [device for device in devices for _ in range(options.workers)]
