"""`l2p serve` as a process of its own, for tests."""

import base64
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from random import Random

from PIL import Image

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "fastapi_offline", "python_multipart")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


class Server:
    """A running server. url: where it is. process: `subprocess.Popen`."""

    def __init__(self, *flags, **environment):
        command = [sys.executable, "-m", "comfyui_l2p", "serve", "--port", "0", *flags]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        line = next((line for line in self.process.stdout if "serving at" in line), None)
        if line is None:
            raise AssertionError(self.process.communicate()[1])
        self.url = line.split()[-1]

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def ask(self, path, body=None, **headers):
        """(status, headers, body) of a GET, or of a POST of JSON or bytes."""
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data)
        if body is not None and not isinstance(body, bytes):
            request.add_header("content-type", "application/json")
        for name, value in headers.items():
            request.add_header(name.replace("_", "-"), value)
        try:
            with opener.open(request, timeout=120) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def generate(self, **body):
        """The answer to a request for images, as JSON."""
        status, _, answer = self.ask("/v1/images/generations", body)
        assert status == 200, answer
        return json.loads(answer)

    def metric(self, name, **headers):
        _, _, text = self.ask("/metrics", **headers)
        return next(
            float(line.split()[1]) for line in text.decode().splitlines() if line.split()[0] == name
        )

    def workers(self):
        """The ids of its worker processes."""
        told = subprocess.run(
            ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
        ).stdout
        return [int(line.split()[0]) for line in told.splitlines() if "spawn_main" in line]


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


opener = urllib.request.build_opener(NoRedirect)


@contextmanager
def serving(*flags, **environment):
    server = Server(*flags, **environment)
    try:
        yield server
    finally:
        server.close()


def image_of(b64):
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def form(parts):
    """The body of a multipart form with boundary X."""
    out = b""
    for name, value in parts:
        file = '; filename="../../a.png"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        head = f'--X\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'
        out += head.encode() + data + b"\r\n"
    return out + b"--X--\r\n"


def damaged_requests(count):
    """(path, body, content type) of so many requests with two faults, of which one stays whatever
    bytes are changed at random."""
    wrong = {"size": "97x97", "num_inference_steps": 0}
    whole = json.dumps({"prompt": "a circle", "n": 1, **wrong}).encode()
    fields = [(name, str(value)) for name, value in wrong.items()]
    edits = form([*fields, ("image", png(Image.new("RGB", (96, 96))))])
    random = Random(0)
    for number in range(count):
        path, body, kind = [
            ("/v1/images/generations", whole, "application/json"),
            ("/v1/images/edits", edits, "multipart/form-data; boundary=X"),
        ][number % 2]
        data = bytearray(body)
        for _ in range(random.randrange(1, 4)):
            data[random.randrange(len(data))] = random.randrange(256)
        if number % 10 == 0:
            data = data[: random.randrange(len(data))]
        if number % 50 == 3:
            data += b" " * 1_100_000
        yield path, bytes(data), kind
