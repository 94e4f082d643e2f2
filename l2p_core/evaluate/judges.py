"""Models that judge images: detectors with colours for GenEval's rules, answers for DPG-Bench's.

A judge is a function, so any model can take its place: a `Detector`, a `ColorReader`, a
`Answerer`. Those here are of transformers. None is the official judge of a benchmark, so scores
carry the judge's name."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ..commands.arguments import require
from ..files.atomic import atomic_write
from ..images import read_image
from ..shapes.judge import examine
from ..shapes.world import PLACES_WORLD
from ..tables import read_rows
from .dpg import Questions
from .geneval import COLORS, Detection, check_metadata, kept
from .layout import Written

GREY = "#999"  # around an object whose colour is read
MAX_INSTANCES = 100
MIN_SCORE = 0.05  # of detections that are kept, well below GenEval's thresholds
SAVE_EVERY = 50  # images
# transformers' names for COCO's classes → GenEval's, where they differ
CLASS_NAMES = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}
# What GenEval has CLIP compare a crop with, see `color_classification` in its program.
COLOR_TEXTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}")
COLOR_TEXT_OF_ANY = "a photo of a {color} object"


@dataclass(frozen=True)
class Found:
    """A detection with its mask, (H, W) bool; None where the whole box counts."""

    detection: Detection
    mask: np.ndarray | None = None


Detector = Callable[[Image.Image], list[Found]]
ColorReader = Callable[[Image.Image, list[Found]], list[str]]  # objects of one class → colours
Answerer = Callable[[Image.Image, str], str]  # image and question → answer


def shapes_detector(image: Image.Image) -> list[Found]:
    """Find the bundled model's shapes with their colours, by measurement. A detection's score is
    its overlap with the ideal shape."""
    scale_x, scale_y = image.width / PLACES_WORLD.side, image.height / PLACES_WORLD.side
    found = []
    for each in examine(image, PLACES_WORLD).objects:
        box = (
            (each.x - each.half) * scale_x,
            (each.y - each.half) * scale_y,
            (each.x + each.half) * scale_x,
            (each.y + each.half) * scale_y,
        )
        found.append(Found(Detection(each.shape, each.overlap, box, each.colour)))
    return found


def load_detector(path: str, device: torch.device) -> Detector:
    """Return a Mask2Former of transformers that was trained on COCO's instances.

    path: its folder, or its name on the Hub."""
    require("evaluate", ("transformers", "scipy"))
    from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

    processor = AutoImageProcessor.from_pretrained(path)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(path, use_safetensors=True)
    model = model.to(device).eval()
    names = {label: CLASS_NAMES.get(name, name) for label, name in model.config.id2label.items()}

    @torch.no_grad()
    def detect(image: Image.Image) -> list[Found]:
        inputs = processor(images=image, return_tensors="pt").to(device)
        outputs = model(**inputs)
        inside = inputs["pixel_mask"][0] > 0  # the rest is padding
        scores, labels, masks = instances(
            outputs.class_queries_logits[0], outputs.masks_queries_logits[0], inside, image.size
        )
        return [
            Found(Detection(names[label], score, mask_box(mask)), mask)
            for score, label, mask in zip(scores.tolist(), labels.tolist(), masks.cpu().numpy())
        ]

    return detect


def instances(
    class_logits: Tensor, mask_logits: Tensor, inside: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores (N,), classes (N,) and masks (N, height, width) of Mask2Former's outputs.

    class_logits: (queries, classes + 1), of no object last. mask_logits: (queries, h, w), of the
    padded input. inside: (H, W), where that input is the image. size: width and height of the
    image. A score is the class's probability times the mask's mean probability, and the best
    MAX_INSTANCES pairs of query and class count, as in Mask2Former's own evaluation. Those whose
    score can't reach MIN_SCORE are left out."""
    shares = class_logits.softmax(-1)[:, :-1]
    best, chosen = shares.flatten().topk(min(MAX_INSTANCES, shares.numel()))
    best, chosen = best[best >= MIN_SCORE], chosen[best >= MIN_SCORE]
    if not len(best):
        return best, chosen, inside.new_zeros(0, *size[::-1])
    labels = chosen % shares.shape[1]
    logits = mask_logits[chosen // shares.shape[1]][None]  # (1, N, h, w)
    logits = F.interpolate(logits, inside.shape, mode="bilinear", align_corners=False)
    rows, columns = int(inside.any(1).sum()), int(inside.any(0).sum())
    logits = logits[..., :rows, :columns]
    logits = F.interpolate(logits, size[::-1], mode="bilinear", align_corners=False)[0]
    masks = logits > 0
    certainty = (logits.sigmoid() * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(1)
    return best * certainty, labels, masks


def mask_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Return the box around a mask: left, top, and right and bottom behind the last pixel."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def load_color_reader(path: str, device: torch.device) -> ColorReader:
    """Return a CLIP of transformers that names an object's colour.

    path: its folder, or its name on the Hub."""
    require("evaluate", ("transformers",))
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(path)
    model = CLIPModel.from_pretrained(path, use_safetensors=True).to(device).eval()
    classifiers: dict[str, Tensor] = {}

    @torch.no_grad()
    def read(image: Image.Image, objects: list[Found]) -> list[str]:
        name = objects[0].detection.name
        crops = [object_crop(image, each) for each in objects]
        texts = [name] if name in classifiers else color_texts(name)
        inputs = processor(text=texts, images=crops, return_tensors="pt", padding=True)
        embeds = model(**inputs.to(device))
        if name not in classifiers:
            each = embeds.text_embeds.unflatten(0, (len(COLORS), -1))  # (colours, texts, width)
            classifiers[name] = F.normalize(each, dim=-1).mean(1)
            classifiers[name] = F.normalize(classifiers[name], dim=-1)
        best = (embeds.image_embeds @ classifiers[name].T).argmax(1)
        return [COLORS[index] for index in best.tolist()]

    return read


def color_texts(name: str) -> list[str]:
    """Return what a crop of an object is compared with: three texts for each of COLORS."""
    return [
        text.format(color=color, name=name)
        for color in COLORS
        for text in (*COLOR_TEXTS, COLOR_TEXT_OF_ANY)
    ]


def object_crop(image: Image.Image, found: Found) -> Image.Image:
    """Return the object in its box, what does not belong to it grey."""
    left, top, right, bottom = map(round, found.detection.box)
    if found.mask is not None:
        blank = Image.new("RGB", image.size, GREY)
        image = Image.composite(image, blank, Image.fromarray(found.mask))
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def detect(
    images: list[Written],
    output: Path,
    name: str,
    detector: Detector,
    color_reader: ColorReader | None = None,
    progress: bool = True,
) -> None:
    """Write the detections of these images to a file, one image a line, as
    `geneval.read_results` reads them. What the file holds by the same judge already is kept."""

    def judge(written: Written) -> dict[str, Any]:
        check_metadata(written.metadata, written.name)
        image = read_image(written.path).convert("RGB")
        found = _with_colors(image, detector(image), written.metadata, color_reader)
        return {
            "image": written.name,
            "metadata": written.metadata,
            "detections": [
                {
                    "class": each.name,
                    "score": round(each.score, 6),
                    "box": [round(side, 2) for side in each.box],
                    **({"color": each.color} if each.color else {}),
                }
                for each in found
            ],
        }

    _judge_all(images, output, "detector", name, judge, progress)


def _with_colors(
    image: Image.Image, found: list[Found], metadata: dict, color_reader: ColorReader | None
) -> list[Detection]:
    """The detections, with colours for the objects whose colour the rules will look at."""
    by_detection = {id(each.detection): each for each in found}
    counting = kept([each.detection for each in found], metadata["tag"])
    colors: dict[int, str] = {}
    for wanted in metadata["include"]:
        objects = counting.get(wanted["class"], [])[: wanted["count"]]
        if "color" not in wanted or color_reader is None or not objects:
            continue
        read = color_reader(image, [by_detection[id(each)] for each in objects])
        colors.update({id(each): color for each, color in zip(objects, read, strict=True)})
    return [
        replace(each.detection, color=colors.get(id(each.detection), each.detection.color))
        for each in found
    ]


def load_answerer(path: str, device: torch.device) -> Answerer:
    """Return a visual question answering model of transformers: BLIP, BLIP-2 or ViLT.

    path: its folder, or its name on the Hub."""
    require("evaluate", ("transformers",))
    from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForVisualQuestionAnswering.from_pretrained(path, use_safetensors=True)
    model = model.to(device).eval()

    @torch.no_grad()
    def answer(image: Image.Image, question: str) -> str:
        inputs = processor(images=image, text=question, return_tensors="pt").to(device)
        if model.can_generate():
            (tokens,) = model.generate(**inputs, max_new_tokens=10)
            return processor.decode(tokens, skip_special_tokens=True)
        return model.config.id2label[int(model(**inputs).logits.argmax())]

    return answer


def ask(
    images: list[Written],
    questions: Questions,
    output: Path,
    name: str,
    answerer: Answerer,
    progress: bool = True,
) -> None:
    """Write the answers to each image's questions to a file, one image a line. What the file
    holds by the same judge already is kept."""

    def judge(written: Written) -> dict[str, Any]:
        item = str(written.metadata.get("item_id"))
        image = read_image(written.path).convert("RGB")
        answers = {
            str(each.number): answerer(image, each.text).strip().lower()
            for each in questions.get(item, [])
        }
        return {"image": written.name, "item_id": item, "cell": written.copy, "answers": answers}

    _judge_all(images, output, "model", name, judge, progress)


def _judge_all(
    images: list[Written],
    output: Path,
    key: str,
    name: str,
    judge: Callable[[Written], dict[str, Any]],
    progress: bool,
) -> None:
    """Write a line for each image, every SAVE_EVERY images and in the end, interrupted or not.

    key: under which a line names its judge. A line is kept while it is newer than its image."""
    lines: dict[str, dict[str, Any]] = {}
    if output.is_file():
        since = output.stat().st_mtime_ns
        names = {each.name for each in images if each.path.stat().st_mtime_ns <= since}
        lines = {
            row["image"]: row
            for row in read_rows(output, any_column=True)
            if row.get(key) == name and row.get("image") in names
        }
    missing = [each for each in images if each.name not in lines]
    if lines:
        print(f"{len(lines)} of {len(images)} images were judged already")
    if not missing:
        return

    def save() -> None:
        rows = [lines[each.name] for each in images if each.name in lines]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with atomic_write(output) as stream:
            stream.write(text.encode())

    try:
        for number, each in enumerate(tqdm(missing, unit="image", disable=not progress), 1):
            lines[each.name] = {key: name, **judge(each)}
            if number % SAVE_EVERY == 0:
                save()
    finally:
        if lines:
            save()
