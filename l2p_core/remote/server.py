"""One ComfyUI server: a job is queued, watched and fetched over its HTTP API.

Nothing that a server answers is taken for granted: another program may be at its address."""

import ipaddress
import json
import sys
import time
import uuid
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tqdm import tqdm

from ..files.content import HEAD_BYTES, identify, printable
from ..images import is_whole_png, open_image
from .workflow import title

if TYPE_CHECKING:
    from requests import Response
    from websocket import WebSocket

TRIES = 3  # a job that takes its server down this often is not sent again
CONNECT_SECONDS, READ_SECONDS = 10, 30
GATEWAY_PATIENCE = 20.0  # seconds, for a server that restarts behind a proxy
MAX_ANSWER_BYTES, MAX_IMAGE_BYTES = 100_000_000, 2_000_000_000
LOCAL_NAMES = (".local", ".lan", ".internal", ".localdomain", ".localhost")
PNG_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


class Away(Exception):
    """The server doesn't answer; it may come back. patience: seconds that it is worth to wait, at
    most."""

    def __init__(self, message: str, patience: float = float("inf")):
        super().__init__(message)
        self.patience = patience


class Rejected(ValueError):
    """The server won't take this workflow, or is no ComfyUI server."""


class Status(Exception):
    """An answer that is an error by its HTTP status."""

    def __init__(self, code: int, reason: str, body: bytes):
        super().__init__(f"{code} {reason}".strip())
        self.code, self.body = code, body


@dataclass(frozen=True)
class Job:
    """One image to generate. uploads: the name that the graph has for a file → the file."""

    output: Path
    graph: dict
    uploads: dict[str, Path]
    # the same in every run of the same command, so that a server that knows the job is not asked
    # again
    id: str

    @property
    def record(self) -> dict:
        """The graph with one entry an input, as it is kept in the image and compared."""
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
        import requests

        self.url = (url if "://" in url else f"http://{url}").rstrip("/")
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port or an IPv6 address that is none
            usable = False
        if not usable:
            raise ValueError(
                f"--server is {url}; expected an address such as http://127.0.0.1:8188"
            )
        self.mark = f"_{parts.netloc.rpartition('@')[2].replace(':', '-')}" if several else ""
        self.is_near = is_near(parts.hostname or "")
        self.session = requests.Session()
        self.client = str(uuid.uuid4())
        self.socket: WebSocket | None = None

    def generate(
        self, job: Job, stop: Event, timeout: float, say: Callable[[str], None]
    ) -> list[bytes]:
        """The job's images as PNG files; none where stop was set. Stays with the job while the
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
                    note(f"{error}; waiting up to {min(timeout, error.patience):g} s for it")
                say("away")
                if time.monotonic() - silent_since >= min(timeout, error.patience):
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
        # The queue first, as a job that ends in between goes from there to the history.
        queued = self.ask_json("/queue")
        for name in ("queue_running", "queue_pending"):
            items = queued.get(name, [])
            if not isinstance(items, list):
                raise self.not_comfyui("/queue", items)
            if any(isinstance(item, list) and item[1:2] == [job.id] for item in items):
                return True
        entry = self.ask_json(f"/history/{job.id}").get(job.id)
        if entry is not None and not isinstance(entry, dict):
            raise self.not_comfyui("/history", entry)
        return entry

    def send(self, job: Job) -> None:
        """Queue the job. Raises Rejected with the reason."""
        for name, file in job.uploads.items():
            self.upload(name, file)
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
        except Status as error:
            reply = read_json(error.body, self.url, error)
        raise Rejected(f"{self.url} rejects the workflow: {explain(reply, job.graph)}")

    def upload(self, name: str, file: Path) -> None:
        """Put a file into the server's input folder under that name. Raises Rejected."""
        files = {"image": (name, file.read_bytes())}
        answer = self.ask("/upload/image", form={"overwrite": "true"}, files=files)
        reply = read_json(answer, self.url)
        if reply.get("name") != name:
            raise self.not_comfyui("/upload/image", reply)

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
                    http_no_proxy=["*"] if self.is_near else None,
                )
            while (rest := until - time.monotonic()) > 0:
                self.socket.settimeout(rest)
                message = self.socket.recv()
                if not message or isinstance(message, bytes):  # previews
                    continue
                if self.tell(json.loads(message), job, say):
                    return
        except websocket.WebSocketTimeoutException:
            pass
        except (websocket.WebSocketException, OSError, ValueError, RecursionError):
            self.socket = None
            time.sleep(max(0.0, until - time.monotonic()))

    def tell(self, message: object, job: Job, say: Callable[[str], None]) -> bool:
        """Pass on what a message says of the job. Returns True where it says that the job ended."""
        kind, facts = as_dict(message).get("type"), as_dict(as_dict(message).get("data"))
        if facts.get("prompt_id") != job.id:
            return False
        if kind in ("execution_error", "execution_interrupted"):
            return True
        if kind not in ("executing", "progress"):
            return False
        node = facts.get("node")
        if node is None:
            return True
        steps = f" {facts.get('value')}/{facts.get('max')}" if kind == "progress" else ""
        say(node_title(job.graph, node) + steps)
        return False

    def fetch(self, entry: dict, job: Job) -> list[bytes]:
        """The images of a job that ended: those it saved, or else its previews. Raises ValueError
        where there are none."""
        if reason := failure(entry, job.graph):
            raise ValueError(f"{self.url}: {reason}")
        images = [
            image
            for output in as_dict(entry.get("outputs")).values()
            for image in as_list(as_dict(output).get("images"))
            if isinstance(image, dict)
        ]
        images = [image for image in images if image.get("type") == "output"] or images
        if not images:
            raise ValueError(
                f"{self.url}: the workflow ran but saved no image; add a Save Image node to it"
            )
        return [self.fetch_image(image) for image in images]

    def fetch_image(self, image: dict) -> bytes:
        """The bytes of one image, as the history names it, once they are found to be a whole PNG.
        Raises ValueError."""
        name = str(image.get("filename"))
        wanted = {key: str(image.get(key, "")) for key in ("filename", "subfolder", "type")}
        try:
            content = self.ask("/view", query=wanted, most=MAX_IMAGE_BYTES)
        except Status:
            raise ValueError(
                f"{self.url} generated {name} but no longer has it, and will not generate the same"
                " image again: restart ComfyUI, or give another --seed"
            ) from None
        if not content.startswith(PNG_HEADER):
            found = identify(content[:HEAD_BYTES])
            what = f"{found.name}, not PNG" if found else "not PNG"
            raise ValueError(
                f"{self.url} made {name}, which is {what}; expected a PNG file of a Save Image node"
            )
        with open_image(BytesIO(content), ("PNG",), name) as opened:
            if not is_whole_png(opened):
                raise ValueError(
                    f"{self.url} sent only a part of {name}. Run the same command again to fetch it"
                )
        return content

    def cancel(self, job: Job) -> None:
        """Take the job out of the queue, or end it where it runs, and nobody else's."""
        self.ask("/queue", {"delete": [job.id]})
        if self.find(job) is True:
            self.ask("/interrupt", {"prompt_id": job.id})

    def ask(
        self,
        path: str,
        body: dict | None = None,
        query: dict | None = None,
        form: dict | None = None,
        files: dict | None = None,
        most: int = MAX_ANSWER_BYTES,
    ) -> bytes:
        """GET, or POST where there is a body or a form. Returns at most so many bytes.

        Raises Away where the server does not answer, Status for /prompt and /view, Rejected where
        else it says no."""
        import requests

        method = "GET" if body is None and form is None else "POST"
        try:
            with self.session.request(
                method,
                self.url + path,
                params=query,
                json=body,
                data=form,
                files=files,
                proxies={"no_proxy": "*"} if self.is_near else None,
                timeout=(CONNECT_SECONDS, READ_SECONDS),
                allow_redirects=False,  # a POST would become a GET
                stream=True,
            ) as reply:
                content = read_at_most(reply, most, f"{self.url}{path}")
        except requests.exceptions.SSLError as error:
            raise Rejected(
                f"{self.url}: its certificate can't be verified ({innermost(error)}). Give its"
                " address with http, or install its certificate on this machine"
            ) from None
        except requests.exceptions.ProxyError as error:
            raise Away(
                f"{self.url} is reached through the proxy of http_proxy or https_proxy, which does"
                f" not answer ({innermost(error)}). Add the server to no_proxy",
                GATEWAY_PATIENCE,
            ) from None
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            raise Away(f"{self.url} does not answer ({innermost(error)})") from None
        except requests.exceptions.RequestException as error:  # cut off, or no HTTP
            raise Away(
                f"{self.url} sends responses that can't be read ({innermost(error)})",
                GATEWAY_PATIENCE,
            ) from None
        if 200 <= reply.status_code < 300:
            return content
        raise self.unusable(path, Status(reply.status_code, reply.reason or "", content), reply)

    def unusable(self, path: str, status: Status, reply: "Response") -> Exception:
        """What to raise for an answer that is an error by its HTTP status."""
        if status.code in (502, 503, 504):
            return Away(
                f"{self.url} answers {status}: the proxy in front of it can't reach it",
                GATEWAY_PATIENCE,
            )
        if 300 <= status.code < 400:
            there = reply.headers.get("Location", "another address")
            return Rejected(f"{self.url} redirects to {there}; give the server's own address")
        if status.code in (401, 403, 407):
            return Rejected(
                f"{self.url} answers {status}: it asks for a login, which l2p does not support"
            )
        if path.startswith(("/prompt", "/view")):
            return status
        return Rejected(f"{self.url}{path} answers {status}; is it a ComfyUI server?")

    def ask_json(self, path: str, body: dict | None = None) -> dict:
        """Ask the server, and parse its answer. Raises Rejected."""
        return read_json(self.ask(path, body), self.url)

    def not_comfyui(self, path: str, answer: object) -> Rejected:
        """What to raise for an answer that no ComfyUI gives."""
        return Rejected(
            f"{self.url}{path} answers {json.dumps(answer)[:40]!r}; is it a ComfyUI server?"
        )


def is_near(host: str) -> bool:
    """Return True for a host on this machine or in a private network, which no proxy leads to."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "." not in host or host.endswith(LOCAL_NAMES)
    return address.is_loopback or address.is_private or address.is_link_local


def read_at_most(reply: "Response", most: int, address: str) -> bytes:
    """The body of an answer. Raises Rejected where it is longer."""
    content = bytearray()
    for block in reply.iter_content(1 << 20):
        content += block
        if len(content) > most:
            raise Rejected(
                f"{address} answers more than {most / 1e6:.0f} MB; is it a ComfyUI server?"
            )
    return bytes(content)


def innermost(error: BaseException) -> str:
    """Why a request failed, without the layers of libraries around it."""
    while (inner := error.__cause__ or error.__context__ or getattr(error, "reason", None)) and (
        isinstance(inner, BaseException)
    ):
        error = inner
    return str(getattr(error, "strerror", None) or error)


def as_dict(value: object) -> dict:
    """The value where it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list:
    """The value where it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def node_title(graph: dict, node: object, otherwise: object = None) -> str:
    """The title of a node that a server names; where the graph has none of that id, otherwise."""
    if isinstance(node, str) and node in graph:
        return title(graph, node)
    return str(node if otherwise is None else otherwise)


def failure(entry: dict, graph: dict) -> str | None:
    """Why the job of this history entry failed; None where it didn't."""
    status = as_dict(entry.get("status"))
    if status.get("status_str") != "error":
        return None
    for message in as_list(status.get("messages")):
        kind, facts = [*as_list(message), None, None][:2]
        facts = as_dict(facts)
        if kind == "execution_error":
            node = facts.get("node_id")
            name = node_title(graph, node, facts.get("node_type"))
            said = str(facts.get("exception_message")).strip()
            return f"{name} (node {node}) failed: {facts.get('exception_type')}: {said}"
        if kind == "execution_interrupted":
            return "the job was interrupted there"
    return "the job failed; the server's log says why"


def explain(reply: dict, graph: dict) -> str:
    """What the server has against the workflow, in plain words."""
    said = []
    for node, facts in as_dict(reply.get("node_errors")).items():
        facts = as_dict(facts)
        kind = str(facts.get("class_type"))
        name = node_title(graph, node, kind)
        name = f"{name} (node {node}" + (f", {kind})" if name != kind else ")")
        said += [f"{name}{fault(as_dict(error))}" for error in as_list(facts.get("errors"))]
    if said:
        return "; ".join(said)

    error = as_dict(reply.get("error"))
    if error.get("type") == "missing_node_type":
        extra = as_dict(error.get("extra_info"))
        kind = str(extra.get("class_type"))
        ours = kind.startswith(("L2P", "EmptyL2P"))
        pack = "ComfyUI-L2P" if ours else "the pack it comes from"
        return (
            f"it does not know the node {kind} (node {extra.get('node_id')}): install {pack} into"
            " custom_nodes and restart the server"
        )
    if error.get("type") == "prompt_no_outputs":
        return "it saves nothing; give it a Save Image node"
    return f"{error.get('message')}: {error.get('details')}"


def fault(error: dict) -> str:
    """What the server has against one input, to be put behind the node's name."""
    extra = as_dict(error.get("extra_info"))
    key, received = extra.get("input_name"), extra.get("received_value")
    kind, limits = [*as_list(extra.get("input_config")), None, None][:2]
    limits = as_dict(limits)
    match error.get("type"):
        case "value_not_in_list":
            options = kind if isinstance(kind, list) else limits.get("options")
            if options:
                has = f"It has {', '.join(map(str, as_list(options)))}"
            elif options == []:
                has = "It has none"
            else:
                has = "Its list is long; ComfyUI shows it in the node"
            return f": {key} is {received!r}, which the server does not have. {has}"
        case "value_smaller_than_min" | "value_bigger_than_max" if {"min", "max"} <= limits.keys():
            return f": {key} is {received!r}; expected {limits['min']} to {limits['max']}"
        case "value_smaller_than_min" | "value_bigger_than_max":
            return f": {key}: {error.get('message')}"
        case "required_input_missing":
            return f" lacks its input {key}"
        case _:
            return f": {error.get('message')}: {error.get('details')}"


def read_json(text: bytes, url: str, status: Status | None = None) -> dict:
    """Parse a server's answer. Raises Rejected where it is no JSON object."""
    try:
        answer = json.loads(text)
        if isinstance(answer, dict):
            return answer
    except (ValueError, RecursionError):
        pass
    found = identify(text[:HEAD_BYTES])
    what = found.name if found and b"<" in text[:HEAD_BYTES] else repr(text[:40])
    with_status = f" {status} and" if status else ""
    raise Rejected(f"{url} answers{with_status} {what}; is it a ComfyUI server?")


def note(text: str) -> None:
    """Print a line above the progress bar."""
    tqdm.write(f"l2p: note: {printable(text)}", file=sys.stderr)
