"""What a run leaves to look at: the log, its curve, and samples as training goes on."""
import csv
import math
from contextlib import suppress
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from PIL import Image, ImageDraw

from ..header import whole

WINDOW, DIVERGED = 100, 3  # a mean loss over so many steps that is so many times the lowest before it
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
    """log.csv, a row for each step, and the same for TensorBoard where that is installed; written by one process alone."""

    def __init__(self, folder: Path, step: int, writes: bool):
        """step: where the run goes on; what was logged after it is forgotten."""
        self.file, self.writes, self.rows, self.lowest, self.board = folder / "log.csv", writes, [], math.inf, None
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            before = read_log(self.file) if self.file.exists() else []
            for row in before:
                if row.step <= step:
                    self.note(row)
            with whole(self.file) as part, part.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([[each.name for each in fields(Row)], *map(astuple, self.rows)])
            with suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.board:
            self.board.close()

    def note(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.rows) > WINDOW:
            self.lowest = min(self.lowest, self.mean())

    def add(self, row: Row) -> None:
        self.note(row)
        if self.writes:
            with self.file.open("a", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerow(astuple(row))
        if self.board:
            for name in ("loss", "learning_rate", "grad_norm"):
                self.board.add_scalar(name, getattr(row, name), row.step)

    def mean(self) -> float:
        recent = self.rows[-WINDOW:]
        return sum(row.loss for row in recent) / len(recent)

    def trouble(self) -> str | None:
        """Why training should stop; None where all is well."""
        row = self.rows[-1]
        if not (math.isfinite(row.loss) and math.isfinite(row.grad_norm)):
            return f"the loss is {row.loss} and its gradient {row.grad_norm} long"
        if self.mean() > DIVERGED * self.lowest:
            return f"the loss diverges: {self.mean():.3g} over the last {WINDOW} steps, and was {self.lowest:.3g}"
        return None


def read_log(file: Path) -> list[Row]:
    """Its whole lines; the last one of a killed run may be half written."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if all(row.values()) and len(row) == len(fields(Row))]
    return [Row(**{each.name: each.type(row[each.name]) for each in fields(Row)}) for row in rows]


def draw_curve(points: list[tuple[int, float]], file: Path) -> None:
    """Write a PNG of (step, loss) points, each the mean of the points that share a column of pixels."""
    columns: dict[int, list[float]] = {}
    first, last = points[0][0], points[-1][0]
    for step, loss in points:
        columns.setdefault(MARGIN + round((step - first) / max(last - first, 1) * (WIDTH - 2 * MARGIN)), []).append(loss)
    means = {x: sum(losses) / len(losses) for x, losses in columns.items()}
    high = max(means.values()) or 1.0
    line = [(x, HEIGHT - MARGIN - mean / high * (HEIGHT - 2 * MARGIN)) for x, mean in means.items()]
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(picture)
    pen.line([(MARGIN, MARGIN), (MARGIN, HEIGHT - MARGIN), (WIDTH - MARGIN, HEIGHT - MARGIN)], fill="grey")
    pen.line(line if len(line) > 1 else line * 2, fill="black", width=2)
    pen.text((MARGIN, MARGIN - 16), f"loss {high:.3g}", fill="black")
    pen.text((MARGIN - 12, HEIGHT - MARGIN - 6), "0", fill="black")
    pen.text((MARGIN, HEIGHT - MARGIN + 4), f"step {first}", fill="black")
    pen.text((WIDTH - MARGIN - 40, HEIGHT - MARGIN + 4), f"{last}", fill="black")
    with whole(file) as part:
        picture.save(part, "PNG")


def show_samples(drawn: list[Image.Image], output: Path, step: int) -> None:
    """Write pictures as one row, and all rows so far below one another."""
    folder = output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / f"step-{step:07d}.png") as part:
        grid([drawn]).save(part, "PNG")
    files = sorted(folder.glob("step-*.png"))
    rows = []
    for number in sorted({round(place * (len(files) - 1) / (SHEET_ROWS - 1)) for place in range(SHEET_ROWS)}):
        with Image.open(files[number]) as row:
            row.thumbnail((len(drawn) * SHEET_SIDE, SHEET_SIDE))
            rows.append([row.copy()])
    with whole(output / "samples.png") as part:
        grid(rows).save(part, "PNG")


def grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures side by side, and rows of them below one another."""
    width = max(sum(picture.width for picture in row) for row in rows)
    sheet = Image.new("RGB", (width, sum(row[0].height for row in rows)))
    top = 0
    for row in rows:
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width
        top += row[0].height
    return sheet
