"""The records of a run: log, loss curve and samples."""

import csv
import io
import math
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import get_type_hints

from PIL import Image, ImageDraw

from ..files.atomic import append, atomic_write
from ..images import open_image
from .boards import Boards

WINDOW, DIVERGED = (
    100,
    3,
)  # a mean loss over so many steps that is so many times the lowest before it
RECENT = 10  # steps that show where it is going
# about the loss of a model that gives 0: the noise's 1, and the image's mean square
NOTHING = 2.0
SHEET_ROWS, SHEET_SIDE = 12, 256  # of samples.png
WIDTH, HEIGHT, MARGIN = 800, 400, 48  # of loss.png, pixels


@dataclass
class Row:
    """One line of the log."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


class Log:
    """log.csv, a row for each step, held_out.csv, and the same on boards; written by one process
    alone."""

    def __init__(self, folder: Path, step: int, writes: bool, boards: Boards | None = None):
        """step: where the run resumes. What was logged after it is dropped."""
        self.folder, self.writes, self.lowest = folder, writes, math.inf
        self.rows: list[Row] = []
        self.boards = boards
        # Every process reads it: they must agree on when to stop.
        for row in read_table(folder / "log.csv", list(get_type_hints(Row).values())):
            if row[0] <= step:
                self.note(Row(*row))
        self.held_out = [
            row for row in read_table(folder / "held_out.csv", [int, float]) if row[0] <= step
        ]
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            write_table(
                folder / "log.csv", [[each.name for each in fields(Row)], *map(astuple, self.rows)]
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.boards:
            self.boards.close()

    def note(self, row: Row) -> None:
        """Take a row into account."""
        self.rows.append(row)
        if len(self.rows) == 1:
            self.lowest = max(row.loss, NOTHING)
        elif len(self.rows) > WINDOW:
            self.lowest = min(self.lowest, self.mean())

    def add(self, row: Row) -> None:
        """Note a row and write it."""
        self.note(row)
        if self.writes:
            write_table(self.folder / "log.csv", [astuple(row)], more=True)
        if self.boards:
            names = ("loss", "learning_rate", "grad_norm")
            self.boards.add_numbers({name: getattr(row, name) for name in names}, row.step)

    def add_held_out(self, step: int, loss: float) -> None:
        """Write the validation loss of a step, in place of an earlier one."""
        self.held_out = [*(row for row in self.held_out if row[0] != step), (step, loss)]
        if self.writes:
            write_table(self.folder / "held_out.csv", [("step", "loss"), *self.held_out])
        if self.boards:
            self.boards.add_numbers({"held_out_loss": loss}, step)

    def mean(self, steps: int | None = None) -> float:
        """Mean loss of the last steps."""
        recent = self.rows[-(steps or WINDOW) :]
        return sum(row.loss for row in recent) / len(recent)

    def steady(self) -> bool:
        """Whether the last few steps are as good as to be saved; where they are not, `trouble` may
        follow."""
        return self.mean(RECENT) <= DIVERGED * self.lowest

    def trouble(self) -> str | None:
        """Why training should stop; None where all is well."""
        row = self.rows[-1]
        if not (math.isfinite(row.loss) and math.isfinite(row.grad_norm)):
            return f"the loss is {row.loss} and its gradient {row.grad_norm} long"
        if len(self.rows) >= WINDOW and self.mean() > DIVERGED * self.lowest:
            return (
                f"the loss diverges: {self.mean():.3g} over the last {WINDOW} steps, and"
                f" {self.lowest:.3g} was to be expected"
            )
        return None


def read_table(file: Path, types: list[type]) -> list[tuple]:
    """Its whole rows, none where there is no file; the last one of a killed run may be half
    written."""
    if not file.is_file():
        return []
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.reader(stream))[1:]
        return [
            tuple(kind(value) for kind, value in zip(types, row))
            for row in rows
            if len(row) == len(types) and all(row)
        ]
    except (csv.Error, ValueError) as error:
        raise ValueError(
            f"{file} can't be read ({error}). Restore it, or delete it: training does not need its"
            " rows"
        ) from None


def write_table(file: Path, rows: list[tuple | list], more: bool = False) -> None:
    """more: append the rows instead of replacing the file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    with append(file) if more else atomic_write(file) as stream:
        stream.write(text.getvalue().encode())


def draw_curves(curves: list[list[tuple[int, float]]], file: Path) -> None:
    """Write a PNG of curves of (step, loss), see `image_of_curves`."""
    with atomic_write(file) as stream:
        image_of_curves(curves).save(stream, "PNG")


def image_of_curves(curves: list[list[tuple[int, float]]]) -> Image.Image:
    """Return an image of curves of (step, loss), the second in red, the third in blue.

    Each point is the mean of those that share a column of pixels."""
    points = [point for curve in curves for point in curve]
    first, last = min(points)[0], max(points)[0]
    means = []
    for curve in curves:
        columns: dict[int, list[float]] = {}
        for step, loss in curve:
            columns.setdefault(
                MARGIN + round((step - first) / max(last - first, 1) * (WIDTH - 2 * MARGIN)), []
            ).append(loss)
        means.append({x: sum(losses) / len(losses) for x, losses in columns.items()})
    high = max(mean for by_column in means for mean in by_column.values()) or 1.0
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    pen.line(
        [(MARGIN, MARGIN), (MARGIN, HEIGHT - MARGIN), (WIDTH - MARGIN, HEIGHT - MARGIN)],
        fill="grey",
    )
    for by_column, colour in zip(means, ("black", "red", "blue")):
        if line := [
            (x, HEIGHT - MARGIN - mean / high * (HEIGHT - 2 * MARGIN))
            for x, mean in by_column.items()
        ]:
            pen.line(line if len(line) > 1 else line * 2, fill=colour, width=2)
    pen.text((MARGIN, MARGIN - 16), f"loss {high:.3g}", fill="black")
    pen.text((MARGIN - 12, HEIGHT - MARGIN - 6), "0", fill="black")
    pen.text((MARGIN, HEIGHT - MARGIN + 4), f"step {first}", fill="black")
    pen.text((WIDTH - MARGIN - 40, HEIGHT - MARGIN + 4), f"{last}", fill="black")
    return image


def samples_file(output: Path, step: int) -> Path:
    """Where the samples of a step are written."""
    return output / "samples" / f"step-{step:07d}.png"


def show_samples(images: list[Image.Image], output: Path, step: int) -> Image.Image:
    """Write images as one row, and all rows so far below one another. Returns the row."""
    file = samples_file(output, step)
    file.parent.mkdir(parents=True, exist_ok=True)
    newest = grid([images])
    with atomic_write(file) as stream:
        newest.save(stream, "PNG")
    files = sorted(file.parent.glob("step-*.png"))
    rows = []
    for number in sorted(
        {round(place * (len(files) - 1) / (SHEET_ROWS - 1)) for place in range(SHEET_ROWS)}
    ):
        with open_image(files[number], ("PNG",)) as row:
            row.thumbnail((len(images) * SHEET_SIDE, SHEET_SIDE))
            rows.append([row.copy()])
    with atomic_write(output / "samples.png") as stream:
        grid(rows).save(stream, "PNG")
    return newest


def grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Images side by side, and rows of them below one another."""
    width = max(sum(image.width for image in row) for row in rows)
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new("RGB", (width, sum(heights)))
    top = 0
    for row, height in zip(rows, heights):
        left = 0
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width
        top += height
    return sheet
