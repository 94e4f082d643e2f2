"""One ComfyUI server: a job is queued, watched and fetched over its HTTP API."""

import json
import sys
import time
import uuid
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from .workflow import title

if TYPE_CHECKING:
    from websocket import WebSocket

TRIES = 3  # a job that takes its server down this often is not sent again


class Away(Exception):
    """The server doesn't answer; it may come back."""


class Refused(ValueError):
    """The server won't take this workflow."""


@dataclass(frozen=True)
class Job:
    """One picture to have drawn. uploads: the name that the graph has for a file → the file."""

    output: Path
    graph: dict
    uploads: dict[str, Path]
    # the same in every run of the same command, so that a server that knows the job is not asked
    # again
    id: str

    @property
    def record(self) -> dict:
        """The graph with one entry an input, as it is kept in the picture and compared."""
        return {
            f"{node}.{name}": value
            for node, settings in self.graph.items()
            for name, value in {"class_type": settings["class_type"], **settings["inputs"]}.items()
        }


class Server:
    """One ComfyUI server, one of several or alone. Its methods raise Away where it does not
    answer."""

    poll = 1.0  # seconds between two looks at a server that says nothing

    def __init__(self, url: str, several: bool = False):
        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(
                f"--server is {url}; expected an address such as http://127.0.0.1:8188"
            )
        self.mark = f"_{parts.netloc.replace(':', '-')}" if several else ""
        self.client = str(uuid.uuid4())
        self.socket: WebSocket | None = None

    def draw(
        self, job: Job, stop: Event, timeout: float, say: Callable[[str], None]
    ) -> list[bytes]:
        """The job's pictures as PNG files; none where stop was set. Stays with the job while the
        server restarts. say takes news of the progress. Raises Away after timeout seconds of
        silence, ValueError where the job fails."""
        entry, sent, lost, silent_since = None, False, 0, None
        while not stop.is_set():
            try:
                known = entry or self.find(job)
                if isinstance(known, dict) and (sent or failure(known, job.graph) is None):
                    entry = known
                    return self.fetch(entry, job)
                if known is not True:
                    lost += sent
                    if lost == TRIES:
                        raise ValueError(
                            f"{self.url} lost the job {TRIES} times; if it runs out of memory, its"
                            " log says so"
                        )
                    if sent:
                        note(f"{self.url} lost {job.output.name}, which is queued again")
                    sent = False
                    self.send(job)
                    sent = True
                silent_since = None
                self.listen(job, say)
            except Away as error:
                if silent_since is None:
                    silent_since = time.monotonic()
                    note(f"{error}; waiting up to {timeout:g} s for it")
                say("away")
                if time.monotonic() - silent_since >= timeout:
                    raise
                stop.wait(self.poll)
        try:
            self.cancel(job)
        except Away as error:
            note(f"{error}; {job.output.name} may still be in its queue")
        return []

    def find(self, job: Job) -> dict | bool | None:
        """What the server's history says of the job; True while it is queued or running, None where
        it is not known."""
        queued = self.ask_json(
            "/queue"
        )  # first, as a job that ends in between goes from here to there
        if any(
            item[1] == job.id
            for items in (queued.get("queue_running", []), queued.get("queue_pending", []))
            for item in items
        ):
            return True
        return self.ask_json(f"/history/{job.id}").get(job.id)

    def send(self, job: Job) -> None:
        """Queue the job. Raises Refused with the reason."""
        for name, file in job.uploads.items():
            border = uuid.uuid4().hex
            head = f"--{border}\r\nContent-Disposition: form-data; name="
            start = f'{head}"overwrite"\r\n\r\ntrue\r\n{head}"image"; filename="{name}"\r\n\r\n'
            body = start.encode() + file.read_bytes() + f"\r\n--{border}--\r\n".encode()
            self.ask("/upload/image", body, f"multipart/form-data; boundary={border}")
        graph = deepcopy(job.graph)
        for settings in (
            graph.values()
        ):  # servers with one folder between them would write over each other's files
            if isinstance(settings["inputs"].get("filename_prefix"), str):
                settings["inputs"]["filename_prefix"] += self.mark
        try:
            reply = self.ask_json(
                "/prompt", {"prompt": graph, "client_id": self.client, "prompt_id": job.id}
            )
            if not reply.get("node_errors"):
                return
            self.cancel(job)  # it was taken, but for some of the workflow's outputs only
        except HTTPError as error:
            reply = read_json(error.read(), self.url)
        raise Refused(f"{self.url} refuses the workflow: {explain(reply, job.graph)}")

    def listen(self, job: Job, say: Callable[[str], None]) -> None:
        """Pass on the job's progress until it ends, `poll` seconds at most. Only a courtesy: what
        counts is `find`."""
        import websocket

        until = time.monotonic() + self.poll
        try:
            if self.socket is None:
                self.socket = websocket.create_connection(
                    f"ws{self.url[4:]}/ws?clientId={self.client}",
                    timeout=self.poll,
                    suppress_origin=True,
                )
            while (rest := until - time.monotonic()) > 0:
                self.socket.settimeout(rest)
                message = self.socket.recv()
                if not message or isinstance(message, bytes):  # previews
                    continue
                message = json.loads(message)
                facts = message.get("data") or {}
                if facts.get("prompt_id") != job.id:
                    continue
                if message["type"] in ("executing", "progress"):
                    node = facts.get("node")
                    if node is None:
                        return
                    steps = (
                        f" {facts['value']}/{facts['max']}" if message["type"] == "progress" else ""
                    )
                    say((title(job.graph, node) if node in job.graph else str(node)) + steps)
                elif message["type"] in ("execution_error", "execution_interrupted"):
                    return
        except websocket.WebSocketTimeoutException:
            pass
        except (websocket.WebSocketException, OSError, ValueError):
            self.socket = None
            time.sleep(max(0.0, until - time.monotonic()))

    def fetch(self, entry: dict, job: Job) -> list[bytes]:
        """The pictures of a job that ended: those it saved, or else its previews. Raises ValueError
        where there are none."""
        if reason := failure(entry, job.graph):
            raise ValueError(f"{self.url}: {reason}")
        images = [
            image for output in entry["outputs"].values() for image in output.get("images", [])
        ]
        images = [image for image in images if image.get("type") == "output"] or images
        if not images:
            raise ValueError(
                f"{self.url}: the workflow ran and made no picture; give it a Save Image node"
            )
        pictures = []
        for image in images:
            try:
                pictures.append(
                    self.ask(
                        "/view?"
                        + urlencode(
                            {key: image.get(key, "") for key in ("filename", "subfolder", "type")}
                        )
                    )
                )
            except HTTPError:
                raise ValueError(
                    f"{self.url} made {image['filename']} and no longer has it. It would not draw"
                    " the same again: restart it, or give another --seed"
                ) from None
            if not pictures[-1].startswith(b"\x89PNG\r\n\x1a\n"):
                raise ValueError(
                    f"{self.url} made {image['filename']}, which is not PNG; save with a Save Image"
                    " node"
                )
        return pictures

    def cancel(self, job: Job) -> None:
        """Take the job out of the queue, or end it where it runs, and nobody else's."""
        self.ask("/queue", {"delete": [job.id]})
        if self.find(job) is True:
            self.ask("/interrupt", {"prompt_id": job.id})

    def ask(
        self, path: str, body: dict | bytes | None = None, content_type: str = "application/json"
    ) -> bytes:
        """GET, or POST where there is a body. Raises HTTPError for /prompt and /view, Refused where
        else it says no."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        try:
            with urlopen(
                Request(self.url + path, data, {"Content-Type": content_type}), timeout=30
            ) as reply:
                return reply.read()
        except HTTPError as error:
            if error.code in (502, 503, 504):  # a proxy, before a server that restarts
                raise Away(f"{self.url} does not answer ({error})") from None
            if path.startswith(("/prompt", "/view")):
                raise
            raise Refused(f"{self.url}{path} answers {error}; is it a ComfyUI server?") from None
        except (OSError, HTTPException) as error:
            raise Away(
                f"{self.url} does not answer ({getattr(error, 'reason', None) or error})"
            ) from None

    def ask_json(self, path: str, body: dict | None = None) -> dict:
        """Ask the server, and parse its answer. Raises Refused."""
        return read_json(self.ask(path, body), self.url)


def failure(entry: dict, graph: dict) -> str | None:
    """Why the job of this history entry failed; None where it didn't."""
    status = entry.get("status") or {}
    if status.get("status_str") != "error":
        return None
    for kind, facts in status.get("messages", []):
        if kind == "execution_error":
            node = facts["node_id"]
            name = title(graph, node) if node in graph else facts.get("node_type")
            message = facts["exception_message"].strip()
            return f"{name} (node {node}) failed: {facts['exception_type']}: {message}"
        if kind == "execution_interrupted":
            return "the job was interrupted there"
    return "the job failed; the server's log says why"


def explain(reply: dict, graph: dict) -> str:
    """What the server has against the workflow, in plain words."""
    said = []
    for node, facts in dict(reply.get("node_errors") or {}).items():
        name = title(graph, node) if node in graph else facts.get("class_type")
        name = f"{name} (node {node}" + (
            f", {facts['class_type']})" if name != facts["class_type"] else ")"
        )
        for error in facts["errors"]:
            extra = error.get("extra_info") or {}
            key = extra.get("input_name")
            config: list = extra.get("input_config") or ["", {}]
            kind, limits = config
            match error["type"]:
                case "value_not_in_list":
                    options = kind if isinstance(kind, list) else limits.get("options")
                    said.append(
                        f"{name}: {key} is {extra['received_value']!r}, which the server does not"
                        " have. "
                        + (
                            f"It has {', '.join(map(str, options))}"
                            if options
                            else (
                                "It has none"
                                if options == []
                                else "Its list is long; ComfyUI shows it in the node"
                            )
                        )
                    )
                case "value_smaller_than_min" | "value_bigger_than_max":
                    said.append(
                        f"{name}: {key} is {extra['received_value']!r}; expected {limits['min']} to"
                        f" {limits['max']}"
                        if {"min", "max"} <= limits.keys()
                        else f"{name}: {key}: {error['message']}"
                    )
                case "required_input_missing":
                    said.append(f"{name} lacks its input {key}")
                case _:
                    said.append(f"{name}: {error['message']}: {error['details']}")
    error = reply.get("error") or {}
    if not said and error.get("type") == "missing_node_type":
        kind = str(error["extra_info"]["class_type"])
        said = [
            f"it does not know the node {kind} (node {error['extra_info']['node_id']}): install "
            + (
                "ComfyUI-L2P"
                if kind.startswith("L2P") or kind.startswith("EmptyL2P")
                else "the pack it comes from"
            )
            + " into custom_nodes and restart the server"
        ]
    elif not said and error.get("type") == "prompt_no_outputs":
        said = ["it saves nothing; give it a Save Image node"]
    return "; ".join(said) or f"{error.get('message')}: {error.get('details')}"


def read_json(text: bytes, url: str) -> dict:
    """Parse a server's answer. Raises Refused where it is no JSON object."""
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise Refused(f"{url} answers {text[:40]!r}; is it a ComfyUI server?") from None


def note(text: str) -> None:
    """Print a line above the progress bar."""
    tqdm.write(f"l2p: note: {text}", file=sys.stderr)
