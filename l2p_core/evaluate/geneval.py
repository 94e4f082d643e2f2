"""GenEval's rules: what an image's detections have to be for its prompt, and the table of scores.

The rules are those of `evaluation/evaluate_images.py` and `evaluation/summary_scores.py` in
github.com/djghosh13/geneval at af4902f (Ghosh et al., arXiv 2310.11513). Official scores also need
GenEval's own judges: Mask2Former with Swin-S from mmdet 2.x, and CLIP ViT-L/14 for colours."""

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..tables import read_rows

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = (
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
    "pink",
    "brown",
    "black",
    "white",
)
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # scores have to be above it
MAX_OBJECTS = 16  # of a class
POSITION_MARGIN = 0.1  # share of both objects' sizes by which their centres have to be apart
RELATIONS = ("left of", "right of", "above", "below")

OFFICIAL = "GenEval's own program"

Box = tuple[float, float, float, float]  # left, top, right, bottom; pixels


@dataclass(frozen=True)
class Detection:
    """An object that a detector found. color: one of COLORS, or None where it was not read."""

    name: str
    score: float
    box: Box
    color: str | None = None


@dataclass(frozen=True)
class Result:
    """What the rules say of an image. fault: why it is wrong; empty where it is right."""

    image: str
    tag: str
    prompt: str
    fault: str
    group: str  # the same for all images of a prompt


def kept(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """Return the detections that count for a task: by class, the highest score first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for each in sorted(detections, key=lambda each: -each.score):
        of_class = found.setdefault(each.name, [])
        if each.score > threshold and len(of_class) < MAX_OBJECTS:
            of_class.append(each)
    return {name: objects for name, objects in found.items() if objects}


def relations(one: Box, other: Box) -> set[str]:
    """Return how the first box lies to the second: some of RELATIONS, or none."""
    offsets, beyond = [], []
    for low, high in ((0, 2), (1, 3)):  # across, then down
        offset = (one[low] + one[high]) / 2 - (other[low] + other[high]) / 2
        sides = abs(one[high] - one[low]) + abs(other[high] - other[low])
        offsets.append(offset)
        beyond.append(math.copysign(max(abs(offset) - POSITION_MARGIN * sides, 0), offset))
    if all(abs(each) < 1e-3 for each in beyond):
        return set()

    across, down = (each / math.hypot(*offsets) for each in beyond)
    holds = (across < -0.5, across > 0.5, down < -0.5, down > 0.5)
    return {name for name, true in zip(RELATIONS, holds) if true}


def faults(detections: Iterable[Detection], metadata: dict) -> list[str]:
    """Return what of a prompt's metadata an image does not show; nothing where it is right.

    Colours and positions are those of the objects with the highest scores. Raises ValueError where
    a colour is asked for that was not read."""
    found = kept(detections, metadata["tag"])
    wrong: list[str] = []
    groups: list[list[Detection] | None] = []  # the objects of each requirement that is met
    for wanted in metadata["include"]:
        name, count = wanted["class"], wanted["count"]
        objects = found.get(name, [])[:count]
        fault = None
        if len(objects) < count:
            fault = f"{len(objects)} {name}, expected {count} or more"
        elif "color" in wanted:
            fault = _colour_fault(objects, wanted)
        if fault is None and "position" in wanted:
            fault = _position_fault(objects, wanted, groups)
        groups.append(objects if fault is None else None)
        if fault:
            wrong.append(fault)
    for unwanted in metadata.get("exclude", []):
        name, count = unwanted["class"], unwanted["count"]
        if len(found.get(name, [])) >= count:
            wrong.append(f"{len(found[name])} {name}, expected fewer than {count}")
    return wrong


def _colour_fault(objects: list[Detection], wanted: dict) -> str | None:
    colours = [each.color for each in objects]
    if None in colours:
        raise ValueError(
            f"a {wanted['class']} has no color, which its prompt names; expected one of"
            f" {', '.join(COLORS)}"
        )
    right = colours.count(wanted["color"])
    if right >= wanted["count"]:
        return None
    return (
        f"{right} {wanted['color']} {wanted['class']}, expected {wanted['count']} or more; found "
        + ", ".join(str(colour) for colour in colours)
    )


def _position_fault(
    objects: list[Detection], wanted: dict, groups: list[list[Detection] | None]
) -> str | None:
    relation, index = wanted["position"]
    targets = groups[index]
    if targets is None:
        return f"nothing that {wanted['class']} could be {relation}"
    for one in objects:
        for other in targets:
            found = relations(one.box, other.box)
            if relation not in found:
                told = " and ".join(sorted(found)) or "neither beside nor above nor below"
                return f"{wanted['class']} is {told} {other.name}, expected {relation}"
    return None


def summarize(results: list[Result]) -> dict[str, Any]:
    """Return the scores as shares: each task's, their mean ("overall"), and those of images and
    prompts."""
    right: Counter[str] = Counter()
    images: Counter[str] = Counter()
    prompts: dict[str, bool] = {}
    for each in results:
        images[each.tag] += 1
        right[each.tag] += not each.fault
        prompts[each.group] = prompts.get(each.group, False) or not each.fault
    tags = [tag for tag in TASKS if tag in images]
    tags += [tag for tag in images if tag not in TASKS]
    tasks = {
        tag: {"score": right[tag] / images[tag], "right": right[tag], "images": images[tag]}
        for tag in tags
    }
    return {
        "overall": sum(task["score"] for task in tasks.values()) / len(tasks),
        "tasks": tasks,
        "images": len(results),
        "prompts": len(prompts),
        "right_images": sum(right.values()) / len(results),
        "right_prompts": sum(prompts.values()) / len(prompts),
    }


def read_metadata(file: Path) -> list[dict]:
    """Return the lines of GenEval's `evaluation_metadata.jsonl`, checked. Raises ValueError."""
    rows = read_rows(file, any_column=True)
    for number, row in enumerate(rows, 1):
        check_metadata(row, f"{file.name}, line {number}")
    return rows


def check_metadata(row: Any, where: str) -> None:
    """Raise ValueError, naming the place, where a prompt's metadata can't be scored."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: the metadata is no table")
    for name in ("tag", "prompt"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{where}: {name} is {row.get(name)!r}; expected text")
    if not isinstance(row.get("include"), list) or not row["include"]:
        raise ValueError(f"{where}: include is {row.get('include')!r}; expected a list of objects")
    for kind in ("include", "exclude"):
        for index, each in enumerate(row.get(kind, [])):
            if fault := _requirement_fault(each, index):
                raise ValueError(f"{where}: {kind}[{index}] {fault}")


def _requirement_fault(wanted: Any, index: int) -> str | None:
    if not isinstance(wanted, dict) or not isinstance(wanted.get("class"), str):
        return "has no class, the name of an object"
    count = wanted.get("count")
    if not isinstance(count, int) or count < 1:
        return f"has count {count!r}; expected a whole number from 1"
    if "color" in wanted and wanted["color"] not in COLORS:
        return f"has color {wanted['color']!r}; expected one of {', '.join(COLORS)}"
    if "position" not in wanted:
        return None
    match wanted["position"]:
        case [relation, int(target)] if relation in RELATIONS and 0 <= target < index:
            return None
    return (
        f"has position {wanted['position']!r}; expected one of {', '.join(RELATIONS)} and the index"
        " of an object before it"
    )


def read_results(file: Path) -> tuple[list[Result], str]:
    """Return the results of a file, and whose judgement they are.

    file: detections, one image a line, to which the rules are applied; or the results that
    GenEval's own program wrote. Raises ValueError, naming the line."""
    results, judges = [], set()
    for number, row in enumerate(read_rows(file, any_column=True), 1):
        where = f"{file.name}, line {number}"
        official = "correct" in row and "tag" in row
        judges.add(OFFICIAL if official else str(row.get("detector", "unnamed")))
        results.append(_official(row, where) if official else _judged(row, where, file.parent))
    return results, " and ".join(sorted(judges))


def _official(row: dict, where: str) -> Result:
    """A line of GenEval's own results."""
    if not isinstance(row["correct"], bool):
        raise ValueError(f"{where}: correct is {row['correct']!r}; expected true or false")
    fault = "" if row["correct"] else str(row.get("reason") or "wrong")
    prompt = str(row.get("prompt", ""))
    group = str(row.get("metadata", prompt))
    return Result(str(row.get("filename", "")), str(row["tag"]), prompt, fault, group)


def _judged(row: dict, where: str, folder: Path) -> Result:
    """A line of detections, judged by the rules."""
    image = row.get("image")
    if not isinstance(image, str):
        raise ValueError(
            f"{where}: image is {image!r}; expected a path such as 00000/samples/0000.png"
        )
    metadata = row.get("metadata")
    if metadata is None:
        metadata = read_image_metadata(folder / image)
    check_metadata(metadata, where)
    if not isinstance(row.get("detections"), list):
        raise ValueError(f"{where}: there is no list of detections; it may be empty")
    detections = [
        _detection(each, f"{where}: detections[{index}]")
        for index, each in enumerate(row["detections"])
    ]
    try:
        fault = "; ".join(faults(detections, metadata))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    group = json.dumps(metadata, sort_keys=True)
    return Result(image, metadata["tag"], metadata["prompt"], fault, group)


def read_image_metadata(image: Path) -> dict:
    """Return the metadata that lies beside an image's folder. Raises ValueError."""
    return read_rows(image.parent.parent / "metadata.jsonl", any_column=True)[0]


def _detection(row: Any, where: str) -> Detection:
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no table")
    name, color = row.get("class"), row.get("color")
    if not isinstance(name, str):
        raise ValueError(f"{where}: class is {name!r}; expected the name of an object")
    if color is not None and not isinstance(color, str):
        raise ValueError(f"{where}: color is {color!r}; expected text")
    score = _number(row.get("score"))
    box = row.get("box")
    sides = [_number(side) for side in box] if isinstance(box, list) else []
    if score is None:
        raise ValueError(f"{where}: score is {row.get('score')!r}; expected a number")
    if len(sides) != 4 or None in sides:
        raise ValueError(f"{where}: box is {box!r}; expected left, top, right, bottom")
    left, top, right, bottom = (float(side or 0) for side in sides)
    return Detection(name, score, (left, top, right, bottom), color)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
