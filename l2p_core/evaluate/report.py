"""Reports: a page of HTML that opens offline, tables, the sheet of pairs that lie far apart."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..files.atomic import atomic_write
from ..images import read_image
from .metrics import Pair

CELL = 256  # pixels: side of an image on the sheet
GAP, LINE = 8, 14
AMPLIFIED = 8  # times: differences on the sheet

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #bbb; padding: .25em .6em; text-align: left }
figure { display: inline-block; margin: .4em; width: 14em; vertical-align: top; font-size: 12px }
figure img { width: 100% }
figcaption span { display: block; color: #a00 }
"""


@dataclass(frozen=True)
class Table:
    """A table with a heading: its first row names the columns."""

    title: str
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Figure:
    """An image of a report with its prompt. note: in red, such as what is wrong with it."""

    path: Path
    caption: str
    note: str = ""


def markdown(table: Table) -> str:
    """Return a table as Markdown, which a terminal shows well too."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def write_html(
    file: Path,
    title: str,
    texts: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[Figure] = (),
    after: Sequence[Table] = (),
) -> None:
    """Write a report: texts, tables, figures, and the tables that come after them.

    It links to the images, relative to itself, and to nothing else."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>',
        f"<style>{STYLE}</style>",
        f"<h1>{escape(title)}</h1>",
    ]
    parts += [f"<p>{escape(text)}</p>" for text in texts]
    parts += map(_html_table, tables)
    if figures:
        parts.append("<h2>Images</h2>")
        parts += [_html_figure(figure, file.parent) for figure in figures]
    parts += map(_html_table, after)
    with atomic_write(file) as stream:
        stream.write(("\n".join(parts) + "\n").encode())


def _html_table(table: Table) -> str:
    head, *rows = table.rows
    lines = [_html_row("th", head), *(_html_row("td", row) for row in rows)]
    return "\n".join([f"<h2>{escape(table.title)}</h2>", "<table>", *lines, "</table>"])


def _html_row(kind: str, cells: Sequence[object]) -> str:
    inner = "".join(f"<{kind}>{escape(str(cell))}</{kind}>" for cell in cells)
    return f"<tr>{inner}</tr>"


def _html_figure(figure: Figure, folder: Path) -> str:
    link = quote(Path(os.path.relpath(figure.path, folder)).as_posix())
    note = f"<span>{escape(figure.note)}</span>" if figure.note else ""
    return (
        f'<figure><a href="{link}"><img src="{link}" loading="lazy" alt=""></a>'
        f"<figcaption>{escape(figure.caption)}{note}</figcaption></figure>"
    )


def pair_sheet(pairs: Sequence[Pair]) -> Image.Image:
    """Return a sheet with a row for each pair: both images, and their difference amplified."""
    width = 3 * CELL + 4 * GAP
    height = CELL + 2 * LINE + GAP
    sheet = Image.new("RGB", (width, GAP + len(pairs) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for index, pair in enumerate(pairs):
        top = GAP + index * height
        one, other = (read_image(path).convert("RGB") for path in (pair.one, pair.other))
        for column, image in enumerate((one, other, difference(one, other))):
            shown = ImageOps.contain(image, (CELL, CELL))
            sheet.paste(shown, (GAP + column * (CELL + GAP), top))
        figures = f"{pair.name}   PSNR {pair.psnr:.1f} dB   SSIM {pair.ssim:.4f}"
        if pair.lpips is not None:
            figures += f"   LPIPS {pair.lpips:.4f}"
        figures += f"   difference x {AMPLIFIED}"
        for line, text in enumerate((figures, _shortened(pair.prompt, pen, width - 2 * GAP))):
            pen.text((GAP, top + CELL + line * LINE), text, fill="black")
    return sheet


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """Return how far each level is off, amplified."""
    levels = np.abs(np.asarray(one, int) - np.asarray(other, int)) * AMPLIFIED
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def _shortened(text: str, pen: ImageDraw.ImageDraw, width: int) -> str:
    """A text that fits the width, in what the built-in font can show."""
    text = text.encode("latin-1", "replace").decode("latin-1").replace("\n", " ")
    if pen.textlength(text) <= width:
        return text
    while text and pen.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def save_sheet(pairs: Sequence[Pair], file: Path) -> None:
    """Write the sheet of these pairs as a PNG."""
    with atomic_write(file) as stream:
        pair_sheet(pairs).save(stream, "PNG")


def card_table(card: dict[str, Any], name: str = "What generated the images") -> Table:
    """Return a card as a table."""
    return Table(name, [("setting", "value"), *card.items()])


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write JSON that a person can read."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_write(file) as stream:
        stream.write(text.encode())
