"""Prompt files and metadata: rows from .txt, .csv, .tsv, .json and .jsonl, as people save them."""

import csv
import io
import json
import re
import warnings
from pathlib import Path

from .files.content import HEAD_BYTES, LFS_POINTER, WEB_PAGE, identify
from .settings import FIELDS

# What a row of a prompt file may set; text is another name for prompt.
COLUMNS = ("file_name", "text", *FIELDS)
SUFFIXES = (".txt", ".csv", ".tsv", ".json", ".jsonl")
# A table's first line names one of these, or its separator is not known.
USUAL_COLUMNS = {*COLUMNS, "image", "caption"}

BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),  # Excel's "Unicode Text", and PowerShell's output
    (b"\xfe\xff", "utf-16"),
)
LINE_END = re.compile(r"\r\n|\r|\n")
EXCEL_HINT = re.compile(r"sep=(.)(?:\r\n|\r|\n)")  # a first line that names the separator


def read_text(file: Path) -> str:
    """Return the text of a file in UTF-8, in UTF-16 with its mark, or in Windows-1252 with a
    warning. Raises ValueError where it is missing or something else."""
    if not file.is_file():  # a FIFO would wait for ever
        raise ValueError(f"there is no {file}")
    content = file.read_bytes()
    found = identify(content[:HEAD_BYTES])
    if found in (LFS_POINTER, WEB_PAGE):
        raise ValueError(f"{file.name} is {found.name}. {found.advice}")

    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" not in text:
        return text
    if b"\0" not in content and encoding == "utf-8":
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            pass
        else:
            warnings.warn(
                f"{file.name} is not UTF-8 and was read as Windows-1252, Excel's plain CSV. Check"
                " accents, or save it as UTF-8",
                stacklevel=2,
            )
            return text
    what = f"is {found.name}" if found else "is not text in UTF-8"
    advice = found.advice if found else "Save it as UTF-8"
    raise ValueError(f"{file.name} {what}. {advice}")


def read_rows(file: Path, any_column: bool = False) -> list[dict]:
    """Return one dict per prompt from .txt, .csv, .tsv, .json or .jsonl.

    any_column: take columns of every name, and none for granted. Raises ValueError with the row
    that can't be read."""
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{file.name} ends in {suffix or 'nothing'}; expected .txt, .csv, .tsv, .json or .jsonl"
        )
    text = read_text(file)
    if suffix == ".txt":
        rows = [{"prompt": line.strip()} for line in LINE_END.split(text) if line.strip()]
    elif suffix in (".csv", ".tsv"):
        rows = _rows_of_csv(file, text)
    else:
        rows = _rows_of_json(file, text, by_line=suffix == ".jsonl")
    if not rows:
        raise ValueError(f"{file.name} holds no prompts")

    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            fault = "unknown column not a table"
        elif not any_column and (unknown := row.keys() - set(COLUMNS)):
            fault = f"unknown column {min(map(str, unknown))}"
        elif not any_column and not isinstance(row.get("prompt", row.get("text")), str):
            fault = "no column prompt or text"
        else:
            continue
        raise ValueError(f"{file.name}, prompt {number}: {fault}; known are {', '.join(COLUMNS)}")
    return rows


def _rows_of_csv(file: Path, text: str) -> list[dict]:
    text, delimiter = _separated(text)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = names
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{file.name} is not CSV: {error}") from None
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"{file.name} has two columns {twice[0]}; give each its own name")

    for number, row in enumerate(rows, 1):
        if row.pop(None, None):  # type: ignore[call-overload]  # where DictReader keeps the rest
            raise ValueError(
                f"{file.name}, prompt {number} has more columns than the first line names; put a"
                " prompt with commas in quotes"
            )
    filled = [{name: value for name, value in row.items() if value} for row in rows]
    return [row for row in filled if row]  # Excel leaves rows of empty cells


def _separated(text: str) -> tuple[str, str]:
    """A table's text without Excel's hint, and its separator: a semicolon or tab only where the
    first line has no comma and names a usual column by it."""
    if hint := EXCEL_HINT.match(text):
        return text[hint.end() :], hint[1]
    first = LINE_END.split(text, maxsplit=1)[0]
    for delimiter in ";\t":
        names = {name.strip(' "') for name in first.split(delimiter)}
        if "," not in first and delimiter in first and names & USUAL_COLUMNS:
            return text, delimiter
    return text, ","


def _rows_of_json(file: Path, text: str, by_line: bool) -> list:
    def constant(name: str) -> None:
        if name != "NaN":  # which is pandas' empty cell
            raise ValueError(f"{name} is no number of JSON")

    try:
        if by_line:
            lines = [line for line in LINE_END.split(text) if line.strip()]
            rows = [json.loads(line, parse_constant=constant) for line in lines]
        else:
            rows = json.loads(text, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} is not {file.suffix[1:].upper()}: {error}") from None
    rows = rows if isinstance(rows, list) else [rows]
    return [{"prompt": row} if isinstance(row, str) else row for row in rows]
