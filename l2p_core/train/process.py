"""A run in a process of its own, for programs that must outlive it, such as ComfyUI.

It is `l2p train`, started with this Python. What it does is read from the files of its folder."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image

from ..files.atomic import atomic_write
from ..images import open_image
from ..interrupt import STATUS
from .config import TrainConfig, to_toml
from .record import Row, grid, image_of_curves, read_table
from .resume import step_file

PACKAGE = Path(__file__).resolve().parents[2]  # a folder with a __main__.py
RECENT = 20  # steps whose time tells how long the rest takes
PERCENT = re.compile(r"^(.+?):\s+(\d+)%\|", re.MULTILINE)  # of tqdm: "encoding captions:  40%|
MESSAGE = re.compile(r"^l2p: (?!note: )", re.MULTILINE)  # what `l2p` says last where it fails
PREVIEW_WIDTH = 768  # pixels


class TrainingError(Exception):
    """Why a run ended early, in whole sentences."""


class TrainingProcess:
    """A run that has been started.

    It saves and ends where `stop` asks for it, and where this process ends, however that
    happens."""

    def __init__(self, config: TrainConfig):
        self.config, self.output = config, Path(config.output)
        self.output.mkdir(parents=True, exist_ok=True)
        settings, self.log = self.output / "settings.toml", self.output / "training.log"
        with atomic_write(settings) as stream:
            stream.write(to_toml(config).encode())
        self.log_start = self.log.stat().st_size if self.log.exists() else 0
        self.rows_before = self._stamp_of_rows()
        with self.log.open("ab") as log:  # a pipe would break the run where this process ends
            self.process = subprocess.Popen(
                [sys.executable, str(PACKAGE), "train", str(settings), "--stop-at-eof"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.output,
                env={**os.environ, "PYTHONUTF8": "1", "TQDM_MININTERVAL": "1"},
                **away_from_terminal(),
            )

    def is_running(self) -> bool:
        """Return whether it has not ended yet."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Ask it to save and end."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def kill(self) -> None:
        """End it at once. What it learned since the last save is lost."""
        self.process.kill()

    def result(self) -> Path | None:
        """Return the newest step file of a run that has ended, None where it was stopped before
        there was one. Raises TrainingError where it failed."""
        status = self.process.wait()
        if status not in (0, *STATUS.values()):
            raise TrainingError(self._reason(status))
        steps = [
            int(file.stem[5:])
            for file in self.output.glob("step-*.safetensors")
            if file.stem[5:].isdigit()
        ]
        return step_file(self.output, max(steps)) if steps else None

    def rows(self) -> list[Row]:
        """Return what is logged of the steps so far; none before the run is set up."""
        if self._stamp_of_rows() == self.rows_before:
            return []
        types = list(get_type_hints(Row).values())
        return [Row(*row) for row in read_table(self.output / "log.csv", types)]

    def status(self, rows: list[Row]) -> str:
        """Return in one sentence what it is doing."""
        if not rows:
            found = PERCENT.findall(self._said())
            return "{}: {} %".format(*found[-1]) if found else "starting"
        step, recent = rows[-1].step, rows[-RECENT:]
        seconds = sum(row.seconds for row in recent) / len(recent)
        loss = sum(row.loss for row in recent) / len(recent)
        left = duration((self.config.steps - step) * seconds)
        return f"step {step} of {self.config.steps}, loss {loss:.4f}, {left} left"

    def preview(self, rows: list[Row]) -> Image.Image | None:
        """Return the newest samples above the curve of the loss, as far as they are there."""
        parts = []
        if files := sorted((self.output / "samples").glob("step-*.png")):
            with open_image(files[-1], ("PNG",)) as samples:
                parts.append(samples.convert("RGB"))
        if rows:
            parts.append(image_of_curves([[(row.step, row.loss) for row in rows]]))
        return stacked(parts, PREVIEW_WIDTH) if parts else None

    def _stamp_of_rows(self) -> tuple[int, int] | None:
        """Return what tells that log.csv was written: a run that resumes writes it anew."""
        try:
            found = (self.output / "log.csv").stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size

    def _said(self) -> str:
        """Return what it printed."""
        with self.log.open("rb") as stream:
            stream.seek(self.log_start)
            return stream.read().decode(errors="replace").replace("\r", "\n")

    def _reason(self, status: int) -> str:
        """Return why it failed, by what it printed last or how it ended."""
        said = self._said()
        if messages := list(MESSAGE.finditer(said)):
            return said[messages[-1].end() :].strip()
        if status == -getattr(signal, "SIGKILL", 9):
            return (
                "the system ended the training, as a rule because memory ran out. Choose settings"
                " that take less memory, or free some"
            )
        lines = said.strip().splitlines() or ["it printed nothing"]
        return f"training ended with status {status}: {lines[-1]}. {self.log} has all it printed"


def away_from_terminal() -> dict[str, Any]:
    """Return arguments for Popen under which Ctrl-C in the terminal does not reach the process,
    which is stopped by its standard input instead."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def duration(seconds: float) -> str:
    """Return a time as a person says it: "40 s", "5 min", "2 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def stacked(images: list[Image.Image], width: int) -> Image.Image:
    """Return images of that width below one another."""
    return grid(
        [[image.resize((width, round(image.height * width / image.width)))] for image in images]
    )
