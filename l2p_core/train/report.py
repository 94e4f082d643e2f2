"""report.html: a run on one page that needs nothing else, to keep or to send.

Settings, data, loss curve and samples. Images are in the page; it loads nothing and runs no
script."""

import base64
import io
from collections.abc import Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from statistics import median

from ..files.atomic import atomic_write
from ..images import open_image
from .buckets import report as bucket_report
from .config import TrainConfig
from .dataset import Data, Example
from .record import Log, samples_file

HIGHEST_ROW = 512  # pixels of the newest row of samples
CAPTIONS_SHOWN = 5

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: 0.1rem 1rem 0.1rem 0; vertical-align: top; }
img { max-width: 100%; display: block; margin: 0.5rem 0; }
pre { white-space: pre-wrap; }
"""


def describe_data(
    data: Data,
    learned: Sequence[Example],
    held_out: Sequence[Example],
    step_images: int,
    nouns: tuple[str, str] = ("image", "caption"),
) -> list[str]:
    """Return what a run trains on, a line each.

    learned: the examples of an epoch. step_images: images that a step takes. nouns: what an example
    and its text are called."""
    noun, text = nouns
    examples = data.examples
    captions = [caption for each in examples for caption in each.captions]
    words = [len(caption.split()) for caption in captions]
    lines = [
        f"{len(data.main)} {noun}s, {len(learned)} an epoch with repeats and regularization",
        f"{len(data.regularization)} regularization images",
        f"{len(held_out)} {noun}s in the validation set",
        f"{sum(each.mask is not None for each in examples)} images with a mask",
        f"{sum(each.seed is not None for each in examples)} images with a seed",
        f"{len(captions)} {text}s of {min(words)} to {max(words)} words, the median"
        f" {median(words):g}; {len(captions) - len(set(captions))} stand more than once",
    ]
    first = list(dict.fromkeys(captions))[:CAPTIONS_SHOWN]
    return [
        *(line for line in lines if not line.startswith("0 ")),
        *bucket_report(list(learned), step_images, noun).splitlines(),
        *(f"{text}: {caption}" for caption in first),
    ]


def write_report(
    config: TrainConfig, step: int, data: Sequence[str], log: Log, prompts: Sequence[str]
) -> None:
    """Write report.html into the run's folder.

    data: lines of `describe_data`. prompts: of the samples, from left to right."""
    output = Path(config.output)
    facts = [("step", f"{step} of {config.steps}")]
    if log.rows:
        facts += [
            ("mean loss of the last 100 steps", f"{log.mean():.4f}"),
            ("seconds of a step, the median", f"{median(row.seconds for row in log.rows):.2f}"),
        ]
    if log.held_out:
        last, loss = log.held_out[-1]
        facts.append(("validation loss", f"{loss:.4f} at step {last}"))
    values = [(each.name, getattr(config, each.name), each.default) for each in fields(config)]
    changed = [(name, value) for name, value, default in values if value != default]
    others = [(name, value) for name, value, default in values if value == default]
    newest = max(samples_file(output, 0).parent.glob("step-*.png"), default=None)
    parts = [
        heading("Progress"),
        table(facts),
        image_of(output / "loss.png", "Loss of each step, and the validation loss in red"),
        heading("Samples"),
        "<p>" + "<br>".join(escape(each) for each in prompts) + "</p>",
        image_of(output / "samples.png", "Samples as training progresses, the newest last"),
        image_of(newest, "The newest samples"),
        heading("Data"),
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in data) + "</ul>",
        heading("Settings"),
        table(changed),
        "<details><summary>Settings left as they are by default</summary>",
        table(others),
        "</details>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(output.name)}: training report</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{escape(output.name)}</h1>\n" + "\n".join(parts) + "\n</body></html>\n"
    )
    with atomic_write(output / "report.html") as stream:
        stream.write(page.encode("utf-8"))


def heading(text: str) -> str:
    """Return a heading of a section."""
    return f"<h2>{escape(text)}</h2>"


def table(rows: Sequence[tuple[str, object]]) -> str:
    """Return a table of names and values."""
    cells = (
        f"<tr><th>{escape(name)}</th><td>{escape(shown(value))}</td></tr>" for name, value in rows
    )
    return "<table>" + "".join(cells) + "</table>"


def shown(value: object) -> str:
    """Return a setting's value as a reader expects it."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    return str(value) if value != "" else "none"


def image_of(file: Path | None, text: str) -> str:
    """Return an image file as a part of the page, `HIGHEST_ROW` high at most unless it holds
    several rows; nothing where there is no readable file."""
    if file is None or not file.is_file():
        return ""
    content = io.BytesIO()
    try:
        with open_image(file, ("PNG",)) as image:
            if file.parent.name == "samples":
                image.thumbnail((image.width, HIGHEST_ROW))
            image.save(content, "PNG")
    except (ValueError, OSError):  # something else of that name, which is no reason to stop
        return ""
    encoded = base64.b64encode(content.getvalue()).decode()
    return (
        f"<figure><figcaption>{escape(text)}</figcaption>"
        f'<img alt="{escape(text)}" src="data:image/png;base64,{encoded}"></figure>'
    )
