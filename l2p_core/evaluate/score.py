"""Apply a benchmark's rules: `l2p evaluate score`."""

import argparse
from pathlib import Path
from typing import Any

from ..devices import default_device
from ..pipeline import usable_device
from . import dpg, geneval, judges, shapes
from .layout import Written, read_card, read_folder
from .report import Figure, Table, card_table, markdown, write_html, write_json

SCORES, REPORT = "scores-{}.json", "report-{}.html"  # by benchmark
DETECTIONS, ANSWERS = "detections.jsonl", "answers.jsonl"

Scored = tuple[dict[str, Any], list[str], list[Table], list[Figure]]


def run_score(args: argparse.Namespace) -> None:
    """Apply a benchmark's rules, and write the scores and a report."""
    if not args.input.exists():
        raise ValueError(f"there is no {args.input}")
    if (args.detector or args.vqa) and not args.input.is_dir():
        raise ValueError(
            f"{args.input} is a file; --detector and --vqa judge the images of a folder"
        )
    folder = args.input if args.input.is_dir() else args.input.parent
    output = args.output or folder
    output.mkdir(parents=True, exist_ok=True)
    score = {"geneval": score_geneval, "dpg": score_dpg, "shapes": score_shapes}[args.benchmark]
    scores, texts, tables, figures = score(args, folder)
    card = read_card(folder)
    if card:
        tables = [*tables, card_table(card)]
    report = output / REPORT.format(args.benchmark)
    content = {"benchmark": args.benchmark, **scores, "card": card}
    write_json(output / SCORES.format(args.benchmark), content)
    write_html(report, f"Scores: {args.benchmark}", texts, tables, figures)
    print("\n".join(texts))
    for table in tables[: len(tables) - bool(card)]:
        print(f"\n{table.title}\n\n{markdown(table)}")
    print(f"\n{report}")


def score_geneval(args: argparse.Namespace, folder: Path) -> Scored:
    """Apply GenEval's rules to detections, of a file or of `--detector`."""
    file = args.input
    if args.input.is_dir():
        file = args.output / DETECTIONS if args.output else folder / DETECTIONS
        if args.detector:
            detect(args, folder, file)
        elif not file.is_file():
            raise ValueError(
                f"{folder} holds no {DETECTIONS}; name a model that finds objects with --detector,"
                " or give a file of detections"
            )
    results, judge = geneval.read_results(file)
    scores = geneval.summarize(results)
    tasks = scores["tasks"]
    official = judge == geneval.OFFICIAL
    texts = ["Scores of GenEval's own program."]
    if not official:
        texts = [
            f"GenEval's rules over detections by {judge}. This is no official GenEval score: that"
            " needs GenEval's own detector, Mask2Former Swin-S of mmdet 2.x, and CLIP ViT-L/14."
        ]
    if any(task not in tasks for task in geneval.TASKS):
        texts.append(
            "Not all six tasks are there: the overall score is the mean of those that are."
        )
    figures = []
    for each in results:
        path = Path(each.image) if official else file.parent / each.image
        if args.input.is_dir() and not official:
            path = folder / each.image
        if path.is_file():
            figures.append(Figure(path, each.prompt, each.fault))
    content = {"judge": judge, "official": official, **scores}
    return content, texts, geneval_tables(scores, judge), figures


def geneval_tables(scores: dict[str, Any], judge: str) -> list[Table]:
    """Return the table of the paper, and the counts behind it."""
    tasks = scores["tasks"]
    row = [judge, f"{scores['overall']:.2f}", *(f"{task['score']:.2f}" for task in tasks.values())]
    names = [name.replace("_", " ") for name in tasks]
    counts = [(name, task["right"], task["images"]) for name, task in zip(names, tasks.values())]
    summary = [
        ("images", scores["images"]),
        ("prompts", scores["prompts"]),
        ("images that are right", f"{scores['right_images']:.2%}"),
        ("prompts with an image that is right", f"{scores['right_prompts']:.2%}"),
    ]
    return [
        Table("Score", [("judge", "overall", *names), row]),
        Table("Images", [("task", "right", "of"), *counts]),
        Table("In all", [("figure", "value"), *summary]),
    ]


def detect(args: argparse.Namespace, folder: Path, file: Path) -> None:
    """Write what `--detector` finds in the images of a folder."""
    images = read_folder(folder)
    device = usable_device(args.device or default_device())
    if args.detector == "shapes":
        judges.detect(images, file, "the shapes judge", judges.shapes_detector)
        return
    colours = any(
        "color" in wanted for each in images for wanted in each.metadata.get("include", [])
    )
    if colours and not args.color_model:
        raise ValueError(
            "the prompts name colours, which needs --color-model, such as a folder of"
            " clip-vit-large-patch14"
        )
    name = f"Mask2Former {Path(args.detector).name}"
    detector = judges.load_detector(args.detector, device)
    reader = None
    if colours:
        name += f" with CLIP {Path(args.color_model).name}"
        reader = judges.load_color_reader(args.color_model, device)
    judges.detect(images, file, name, detector, reader)


def score_dpg(args: argparse.Namespace, folder: Path) -> Scored:
    """Apply DPG-Bench's rules to answers, of a file or of `--vqa`."""
    if args.csv is None:
        raise ValueError("DPG-Bench needs its questions: --csv dpg_bench.csv")
    questions = dpg.read_questions(args.csv)
    file = args.input
    if args.input.is_dir():
        file = args.output / ANSWERS if args.output else folder / ANSWERS
        if args.vqa:
            device = usable_device(args.device or default_device())
            answerer = judges.load_answerer(args.vqa, device)
            judges.ask(read_folder(folder), questions, file, Path(args.vqa).name, answerer)
        elif not file.is_file():
            raise ValueError(
                f"{folder} holds no {ANSWERS}; name a model that answers questions with --vqa, or"
                " give a file of answers"
            )
    answers, judge = dpg.read_answers(file, questions)
    forms = {
        "upstream": dpg.score(questions, answers, upstream=True),
        "corrected": dpg.score(questions, answers),
    }
    if not forms["corrected"].prompts and not forms["upstream"].prompts:
        fault = next(iter(forms["corrected"].left_out.items()), ("", "there are no answers"))
        raise ValueError(f"{file} gives no score: {fault[0]}: {fault[1]}")
    texts = [
        f"DPG-Bench's rules over answers by {judge}."
        + ("" if judge == dpg.OFFICIAL else " Official scores need its own judge, mPLUG-large."),
        "upstream: as the official program counts. corrected: with the first question of the first"
        " prompt (issue 61), and with the categories of all cells (issue 60).",
    ]
    texts += [
        f"Left out ({name}): {item}, {fault}."
        for name, form in forms.items()
        for item, fault in form.left_out.items()
    ]
    figures = []
    if args.input.is_dir():
        figures = [figure_of(each) for each in read_folder(folder)]
    scores = {name: dpg.as_json(form) for name, form in forms.items()}
    return {"judge": judge, **scores}, texts, dpg_tables(forms), figures


def dpg_tables(forms: dict[str, dpg.Scores]) -> list[Table]:
    """Return the scores by form, as in the paper, and by detailed category."""
    names = sorted({name for form in forms.values() for name in form.broad})
    head = ("form", "prompts", "DPG-Bench", *names)
    rows = [
        (
            name,
            form.prompts,
            f"{100 * form.overall:.2f}",
            *(f"{100 * form.broad[each]:.2f}" if each in form.broad else "" for each in names),
        )
        for name, form in forms.items()
    ]
    detailed = sorted({name for form in forms.values() for name in form.detailed})
    categories = [
        (each, *(f"{100 * form.detailed.get(each, 0):.2f}" for form in forms.values()))
        for each in detailed
    ]
    return [
        Table("Score", [head, *rows]),
        Table("Categories", [("category", *forms), *categories]),
    ]


def score_shapes(args: argparse.Namespace, folder: Path) -> Scored:
    """Score the images of the bundled model's own prompts."""
    images = read_folder(folder)
    scores = shapes.score(images)
    table = Table("Percent of images that are right", [tuple(scores), tuple(scores.values())])
    figures = [figure_of(each) for each in images]
    return {"percent": scores}, [f"{len(images)} images."], [table], figures


def figure_of(image: Written) -> Figure:
    """Return an image of a folder as a figure."""
    return Figure(image.path, str(image.metadata.get("prompt", "")))
