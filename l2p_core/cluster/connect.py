"""Join a Ray cluster, or start Ray on this machine alone."""

import logging
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

from ..files.content import printable

CONNECT_SECONDS = 10.0


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Take part in the Ray cluster at HOST:PORT, of which this machine is a node. "" for the one
    in RAY_ADDRESS, else for Ray on this machine alone, which ends with the block.

    Ray reports nothing to anyone. Started here, it listens at 127.0.0.1 only and asks for a key
    that only this process and its own know. Raises ValueError where that fails."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray does from now on
    if address:
        check_address(address)
        settings: dict[str, Any] = {"address": address}
    else:
        stay_local()
        settings = {"address": "local", "include_dashboard": False}
    import ray

    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**settings, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        what = f"Ray can't join the cluster at {address}" if address else "Ray can't be started"
        raise ValueError(
            f"{what}: {printable(first)}. Every machine needs the same versions of Ray and Python"
        ) from None
    finally:
        if current_thread() is main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray takes it
    try:
        yield
    finally:
        ray.shutdown()


def stay_local() -> None:
    """Let the Ray that this process starts listen at 127.0.0.1 only, and ask for a key.

    Without this it listens at all addresses: Ray has that switch for Windows and macOS, whose
    firewalls ask. Works before Ray is imported."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def check_address(address: str) -> None:
    """Raise ValueError for what is no address, or where nothing answers: Ray itself would try for
    minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--ray is {address!r}; expected HOST:PORT, such as 10.0.0.1:6379, or nothing to start"
            " Ray on this machine. A prompt goes before --ray"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"no Ray answers at {address}: {error}. Start it there: ray start --head"
        ) from None
