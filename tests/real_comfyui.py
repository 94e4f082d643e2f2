"""A real ComfyUI to test against: at $COMFYUI_PATH, in the folders above (as an installed pack), or at ~/comfy/ComfyUI."""
import json
import os
import subprocess
import tempfile
from pathlib import Path

PACK = Path(__file__).parents[1]


def find() -> tuple[Path, Path] | str:
    """(its folder, its Python), or why there is none."""
    given = os.environ.get("COMFYUI_PATH")
    places = [Path(given)] if given else [*PACK.parents, Path.home() / "comfy" / "ComfyUI"]
    root = next((place for place in places if (place / "comfyui_version.py").is_file()), None)
    if root is None:
        return f"no ComfyUI at {given}" if given else "no ComfyUI at $COMFYUI_PATH, in a folder above, or at ~/comfy/ComfyUI"
    python = Path(os.environ.get("COMFYUI_PYTHON") or root / ".venv" / "bin" / "python")
    if not python.is_file():
        return f"ComfyUI is at {root}, but its Python is not at {python}; set $COMFYUI_PYTHON"
    return root, python


class Refused(Exception):
    """What ComfyUI answered with an error."""


class Worker:
    """ComfyUI in a process of its own, with the pack imported. worker.call("forward", ...) → the answer."""

    def __init__(self, root: Path, python: Path, folder: Path):
        version = {}
        exec((root / "comfyui_version.py").read_text(), version)
        self.version = tuple(map(int, version["__version__"].split(".")[:2]))
        base = folder / "base"
        (base / "custom_nodes").mkdir(parents=True)
        link = base / "custom_nodes" / "ComfyUI-L2P"
        link.symlink_to(PACK)
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("comfyui_worker.py"), root, link, "--base-directory", base],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=folder)
        self.nodes = self.call("import_pack")

    def call(self, name: str, **arguments):
        self.process.stdin.write(json.dumps({"call": name, "arguments": arguments}, default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f"ComfyUI ended: {self.log.read()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.log.close()
