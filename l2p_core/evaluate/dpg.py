"""DPG-Bench's rules: answers to yes-or-no questions about each image → scores.

The rules are those of `dpg_bench/compute_dpg_bench.py` in github.com/TencentQQGYLab/ELLA at 3c228f1
(Hu et al., arXiv 2403.05135). Official scores also need its own judge, mPLUG-large. That program
has two known faults, which `score` repeats on request, so that published figures can be compared:
it drops the first question of the first prompt (issue 61), and it scores categories on the last of
an image's cells (issue 60)."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..tables import read_rows, read_text

OFFICIAL = "DPG-Bench's own program"
YES = "yes"
CELLS = 4  # a grid is 2 x 2
# A line of the official program's *_detail.txt: path, (left, top, right, bottom), question, answer
DETAIL = re.compile(r"(.+?), \((\d+), (\d+), (\d+), (\d+)\), (.+), ([^,]*)")


@dataclass(frozen=True)
class Question:
    """A question about a prompt's images. It counts only where its parents are answered yes."""

    number: int
    text: str
    parents: tuple[int, ...]
    category: str  # "attribute - color"; what stands before the dash is the broad category


Questions = dict[str, list[Question]]  # by prompt, in the file's order
Answers = dict[tuple[str, int, int], str]  # by prompt, cell and question


@dataclass
class Scores:
    """Scores as shares. left_out: prompts that can't be scored, with the reason."""

    overall: float = 0.0
    prompts: int = 0
    broad: dict[str, float] = field(default_factory=dict)
    detailed: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def read_questions(file: Path) -> Questions:
    """Return the questions of `dpg_bench.csv`. Raises ValueError, naming the row."""
    questions: dict[str, dict[int, Question]] = {}
    for number, row in enumerate(read_rows(file, any_column=True), 1):
        where = f"{file.name}, row {number}"
        missing = [
            name
            for name in ("item_id", "proposition_id", "dependency", "tuple")
            if row.get(name) is None
        ]
        text = row.get("question_natural_language")
        if missing or text is None:
            name = missing[0] if missing else "question_natural_language"
            raise ValueError(f"{where} has no {name}; expected the columns of DPG-Bench's table")
        try:
            proposition = int(row["proposition_id"])
            parents = tuple(int(each) for each in str(row["dependency"]).split(","))
        except ValueError:
            raise ValueError(
                f"{where}: proposition_id is {row['proposition_id']!r} and dependency"
                f" {row['dependency']!r}; expected whole numbers, with commas between"
            ) from None
        category = row["tuple"].partition("(")[0].strip()
        parents = tuple(each for each in parents if each != 0)
        question = Question(proposition, text.strip(), parents, category)
        questions.setdefault(row["item_id"].strip(), {})[proposition] = question
    return {item: list(asked.values()) for item, asked in questions.items()}


def read_answers(file: Path, questions: Questions) -> tuple[Answers, str]:
    """Return the answers of a file, and whose they are.

    file: one image a line (item_id, cell from 0, answers: question → answer), or the official
    program's `*_detail.txt`. Raises ValueError, naming the line."""
    if file.suffix.lower() == ".txt":
        return _official_answers(file, questions), OFFICIAL
    answers: Answers = {}
    judges = set()
    for number, row in enumerate(read_rows(file, any_column=True), 1):
        try:
            item, cell = str(row["item_id"]), int(row["cell"])
            for question, answer in row["answers"].items():
                answers[item, cell, int(question)] = str(answer)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(
                f"{file.name}, line {number} has {', '.join(map(str, row))}; expected item_id, cell"
                ' (from 0) and answers, such as {"1": "yes", "2": "no"}'
            ) from None
        judges.add(str(row.get("model", "unnamed")))
    return answers, " and ".join(sorted(judges))


def _official_answers(file: Path, questions: Questions) -> Answers:
    answers: Answers = {}
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file.name}, line {number}"
        match = DETAIL.fullmatch(line)
        if match is None:
            raise ValueError(
                f"{where} is {line[:80]!r}; expected path, (left, top, right, bottom), question,"
                " answer"
            )
        path, left, top, right, bottom, text, answer = match.groups()
        item = re.split(r"[/\\]", path)[-1].partition(".")[0]
        cell = 2 * (int(top) > 0) + (int(left) > 0)
        known = [each.number for each in questions.get(item, []) if each.text == text.strip()]
        if not known:
            raise ValueError(f"{where}: the table has no question {text!r} for {item}")
        for each in known:
            answers[item, cell, each] = answer
    return answers


def score(questions: Questions, answers: Answers, upstream: bool = False) -> Scores:
    """Return DPG-Bench's scores.

    A prompt's score is the mean over its cells of the share of questions that count as yes. A
    question counts as no where a parent does. Categories count the answers as they were given.
    Prompts without answers are no part of it. upstream: with the official program's faults."""
    scores = Scores()
    means: list[float] = []
    by_category: dict[str, list[bool]] = defaultdict(list)
    first = next(iter(questions), None)
    cells_of: dict[str, set[int]] = defaultdict(set)
    for item, cell, _ in answers:
        cells_of[item].add(cell)
    for item in sorted(cells_of):
        asked = questions.get(item, [])
        if upstream and item == first:
            asked = asked[1:]
        cells = sorted(cells_of[item])
        if fault := _fault(item, asked, cells, answers):
            scores.left_out[item] = fault
            continue
        shares = []
        for cell in cells:
            given = {each.number: answers[item, cell, each.number] == YES for each in asked}
            counted = _counted(asked, given)
            shares.append(sum(counted.values()) / len(counted))
            if not upstream or cell == cells[-1]:
                for each in asked:
                    by_category[each.category].append(given[each.number])
        means.append(sum(shares) / len(shares))

    broad: dict[str, list[bool]] = defaultdict(list)
    for category, values in by_category.items():
        broad[category.partition("-")[0].strip()] += values
    scores.prompts = len(means)
    scores.overall = sum(means) / len(means) if means else 0.0
    scores.broad = {name: sum(values) / len(values) for name, values in sorted(broad.items())}
    scores.detailed = {
        name: sum(values) / len(values) for name, values in sorted(by_category.items())
    }
    return scores


def _counted(asked: list[Question], given: dict[int, bool]) -> dict[int, bool]:
    """The answers, each no where a parent is. In the table's order, as upstream: a parent that
    became no makes those below it no."""
    counted = dict(given)
    for each in asked:
        if not all(counted[parent] for parent in each.parents):
            counted[each.number] = False
    return counted


def _fault(item: str, asked: list[Question], cells: list[int], answers: Answers) -> str | None:
    """Why a prompt can't be scored; None where it can."""
    if not asked:
        return "the table has no questions for it"
    numbers = {each.number for each in asked}
    for each in asked:
        if lost := set(each.parents) - numbers:
            return f"question {each.number} depends on question {min(lost)}, which is not there"
    for cell in cells:
        open_ = [number for number in sorted(numbers) if (item, cell, number) not in answers]
        if open_:
            return f"question {open_[0]} has no answer for cell {cell}"
    return None


def as_json(scores: Scores) -> dict[str, Any]:
    """Return the scores in percent, as the official program prints them."""
    return {
        "DPG-Bench": round(100 * scores.overall, 2),
        "prompts": scores.prompts,
        "L1": {name: round(100 * share, 2) for name, share in scores.broad.items()},
        "L2": {name: round(100 * share, 2) for name, share in scores.detailed.items()},
        "left_out": scores.left_out,
    }
