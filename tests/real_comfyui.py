"""A real ComfyUI to test against: at $COMFYUI_PATH, in the folders above (as an installed pack), or
at ~/comfy/ComfyUI.

Run as a program it tests several versions, each a folder with a checkout and its Python in .venv:

    python tests/real_comfyui.py --versions ~/comfy/v0.16 ~/comfy/v0.33 --newest ~/comfy/v0.33

--newest: also the stand-in for the newest ComfyUI (`comfyui_stand_ins`), made from that checkout.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

PACK = Path(__file__).parents[1]


def find() -> tuple[Path, Path] | str:
    """(its folder, its Python), or why there is none."""
    given = os.environ.get("COMFYUI_PATH")
    places = [Path(given)] if given else [*PACK.parents, Path.home() / "comfy" / "ComfyUI"]
    root = next((place for place in places if (place / "comfyui_version.py").is_file()), None)
    if root is None:
        return (
            f"no ComfyUI at {given}"
            if given
            else "no ComfyUI at $COMFYUI_PATH, in a folder above, or at ~/comfy/ComfyUI"
        )
    python = Path(os.environ.get("COMFYUI_PYTHON") or root / ".venv" / "bin" / "python")
    if not python.is_file():
        return f"ComfyUI is at {root}, but its Python is not at {python}; set $COMFYUI_PYTHON"
    return root, python


LENT = ("accelerate", "peft")  # pure Python; training needs them, and ComfyUI does not bring them


def lend_packages(python: Path, folder: Path) -> dict[str, str]:
    """The environment in which ComfyUI's Python has what training needs: what it lacks is lent by
    this one."""
    missing = f"import importlib.util as u; print(*(n for n in {LENT} if not u.find_spec(n)))"
    asked = subprocess.run([python, "-c", missing], stdout=subprocess.PIPE, text=True, check=True)
    lent = folder / "lent"
    lent.mkdir()
    for name in asked.stdout.split():
        found = importlib.util.find_spec(name)
        if found is None:
            continue  # the tests of training are skipped
        package = Path(found.origin).parent
        for part in (package, *package.parent.glob(f"{name}-*.dist-info")):
            (lent / part.name).symlink_to(part)
    return {**os.environ, "PYTHONPATH": str(lent)}


class Rejected(Exception):
    """What ComfyUI answered with an error."""


def install_pack(folder: Path) -> tuple[Path, Path]:
    """(a base directory for ComfyUI in that folder, the pack installed in it)."""
    base = folder / "base"
    (base / "custom_nodes").mkdir(parents=True)
    link = base / "custom_nodes" / "ComfyUI-L2P"
    link.symlink_to(PACK)
    return base, link


class Worker:
    """ComfyUI in a process of its own, with the pack imported. worker.call("forward", ...) → the
    answer."""

    def __init__(self, root: Path, python: Path, folder: Path):
        version = re.search(r"(\d+)\.(\d+)\.", (root / "comfyui_version.py").read_text())
        self.version = tuple(map(int, version.groups()))
        base, link = install_pack(folder)
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [
                python,
                Path(__file__).with_name("comfyui_worker.py"),
                root,
                link,
                "--base-directory",
                base,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=folder,
        )
        self.nodes = self.call("import_pack")

    def call(self, name: str, **arguments):
        self.process.stdin.write(
            json.dumps({"call": name, "arguments": arguments}, default=str) + "\n"
        )
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"ComfyUI ended: {self.log.read()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Rejected(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(120)
        self.log.close()


class Server:
    """ComfyUI's server on a free port, with the pack and no other installed, and folders of its
    own.

    server.run(graph) → [image files, as bytes]; server.models / "loras" is where files go;
    server.log tells what it said."""

    def __init__(
        self, root: Path, python: Path, folder: Path, *arguments: str, ready_within: float = 300
    ):
        self.base, _ = install_pack(folder)
        self.models = self.base / "models"
        for name in ("checkpoints", "diffusion_models", "text_encoders", "loras"):
            (self.models / name).mkdir(parents=True)
        settings = self.base / "user" / "default" / "comfy.settings.json"
        settings.parent.mkdir(parents=True)
        settings.write_text(
            '{"Comfy.TutorialCompleted": true}'
        )  # or the page opens with a tour over the canvas
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    python,
                    root / "main.py",
                    "--cpu",
                    "--port",
                    str(port),
                    "--listen",
                    "127.0.0.1",
                    "--base-directory",
                    self.base,
                    "--database-url",
                    f"sqlite:///{folder / 'comfyui.db'}",
                    "--disable-auto-launch",
                    "--disable-api-nodes",
                    *arguments,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=lend_packages(python, folder),
            )
        deadline = time.monotonic() + ready_within
        while not self._answers():
            ended = self.process.poll()
            if ended is not None or time.monotonic() > deadline:
                self.close()
                why = (
                    f"is not ready after {ready_within} s"
                    if ended is None
                    else f"ended with {ended}"
                )
                raise RuntimeError(f"ComfyUI's server {why}: {self.log.read_text()[-3000:]}")
            time.sleep(0.5)

    def _answers(self) -> bool:
        try:
            return "system" in self.get("/system_stats")
        except OSError:
            return False

    def get(self, path: str, **query) -> dict | list | bytes:
        """What the server answers: parsed where it is JSON. Raises Rejected."""
        return self._open(f"{path}?{urllib.parse.urlencode(query)}" if query else path)

    def post(self, path: str, body: dict) -> dict | list | bytes:
        return self._open(path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _open(
        self, path: str, data: bytes | None = None, headers: dict[str, str] = {}
    ) -> dict | list | bytes:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.url + path, data, headers), timeout=60
            ) as answer:
                body = answer.read()
                return (
                    json.loads(body)
                    if body and answer.headers.get_content_type() == "application/json"
                    else body
                )
        except urllib.error.HTTPError as error:
            raise Rejected(error.read().decode(errors="replace") or str(error)) from None

    def upload(self, name: str, data: bytes) -> str:
        """Put an image into ComfyUI's input folder, as the Load Image node does. Returns the name
        it has there."""
        edge = uuid.uuid4().hex
        head = (
            f'--{edge}\r\nContent-Disposition: form-data; name="image";'
            f' filename="{name}"\r\nContent-Type: image/png\r\n\r\n'
        )
        overwrite = (
            f"\r\n--{edge}\r\nContent-Disposition: form-data;"
            f' name="overwrite"\r\n\r\ntrue\r\n--{edge}--\r\n'
        )
        return self._open(
            "/upload/image",
            head.encode() + data + overwrite.encode(),
            {"Content-Type": f"multipart/form-data; boundary={edge}"},
        )["name"]

    def queue(self, graph: dict) -> str:
        """The id of the prompt. Raises Rejected where the graph does not pass ComfyUI's validation,
        or not all of it."""
        answer = self.post("/prompt", {"prompt": graph})
        if answer["node_errors"]:
            raise Rejected(json.dumps(answer["node_errors"]))
        return answer["prompt_id"]

    def wait(self, prompt_id: str, seconds: float = 300) -> dict:
        """The prompt's history entry once it has run. Raises Rejected with the node's own message
        where it failed."""
        deadline = time.monotonic() + seconds
        while not (entry := self.get(f"/history/{prompt_id}").get(prompt_id, {})).get("status"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the prompt did not finish in {seconds} s: {self.log.read_text()[-3000:]}"
                )
            time.sleep(0.2)
        if entry["status"]["status_str"] != "success":
            failed = [
                message
                for kind, message in entry["status"]["messages"]
                if kind == "execution_error"
            ]
            raise Rejected(
                "; ".join(f"{each['node_type']}: {each['exception_message']}" for each in failed)
                or str(entry["status"])
            )
        return entry

    def run(self, graph: dict, seconds: float = 300) -> list[bytes]:
        """Run a graph in API form. Returns the image files it saved, in the order of its
        nodes."""
        outputs = self.wait(self.queue(graph), seconds)["outputs"]
        return [
            self.get("/view", **{key: image[key] for key in ("filename", "subfolder", "type")})
            for node in graph
            for image in outputs.get(node, {}).get("images", ())
        ]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def test_versions(versions: list[Path], newest: Path | None, arguments: list[str]) -> int:
    """Run the tests that need a ComfyUI on each, and print a line for each. Returns the number of
    those that failed."""
    import comfyui_stand_ins

    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tested = [(root.name, root, root) for root in versions]
        if newest:
            tested.append(
                (
                    f"newest, from {newest.name}",
                    comfyui_stand_ins.make_stand_in(newest, Path(folder)),
                    newest,
                )
            )
        for name, root, installed in tested:
            python = installed / ".venv" / "bin" / "python"
            environment = {**os.environ, "COMFYUI_PATH": str(root), "COMFYUI_PYTHON": str(python)}
            files = [
                *sorted(Path(__file__).parent.glob("test_comfyui_*.py")),
                Path(__file__).with_name("test_workflows.py"),
            ]
            run = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", *files, *arguments],
                env=environment,
                cwd=PACK,
                stdout=subprocess.PIPE,
                text=True,
            )
            print(run.stdout, flush=True)
            rows.append(f"{name}: {run.stdout.strip().splitlines()[-1]}")
            failed += run.returncode != 0
    print(*rows, sep="\n")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="*", type=Path, default=[], metavar="FOLDER")
    parser.add_argument("--newest", type=Path, metavar="FOLDER")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    given = parser.parse_args()
    sys.exit(test_versions(given.versions, given.newest, given.pytest))
