"""Where images are written: names from rows, checked before anything is generated."""

import os
import re
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from unicodedata import normalize

from .settings import MAX_COUNT, checked_text

MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095  # of usual file systems
# Windows: names of devices, whatever follows the first dot, and what no name may hold.
DEVICE = re.compile(r"(?:CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?:\..*)?", re.IGNORECASE)
NOT_ON_WINDOWS = re.compile(r'[<>:"|?*]')
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def output_files(rows: list[dict], count: int, output: Path) -> list[list[Path]]:
    """The files of each row's images: `output` itself where it is a .png, else named in that folder
    by the row's file_name or number, and by the copy where there are several.

    Raises ValueError where that makes no sense or can't be written."""
    images = len(rows) * count
    if count < 1:
        raise ValueError(f"--count is {count}; expected 1 or more")
    if images > MAX_COUNT:
        raise ValueError(f"that makes {images:,} images; expected at most {MAX_COUNT:,}")
    if is_one_image(output):
        if images > 1:
            raise ValueError(f"--output is one file, {output}, for {images} images; give a folder")
        files = [[output]]
    else:
        files = [_files_of_row(row, number, count, output) for number, row in enumerate(rows)]
    _reject_clashes(files)
    for number, row_files in enumerate(files, 1):
        for file in row_files:
            if fault := _unwritable(file):
                raise ValueError(f"prompt {number}: {file} can't be written: {fault}")
    return files


def is_one_image(output: Path) -> bool:
    """Return True where an output is one image file, and False for a folder, which may have a dot
    in its name. Raises ValueError for image files of other formats than PNG."""
    from PIL import Image

    suffix = output.suffix.lower()
    if not suffix or output.is_dir():
        return False
    if suffix == ".png":
        return True
    if suffix in Image.registered_extensions():
        raise ValueError(
            f"--output is {output}; images are written as .png, which stores their"
            " settings. Give a name that ends in .png, or a folder"
        )
    return False


def name_fault(name: str, windows: bool = os.name == "nt") -> str | None:
    """Return why no image can have this name, relative to a folder and with / between folders;
    None where it can."""
    if CONTROL.search(name):
        return "holds control characters"
    for part in PurePosixPath(name).parts:
        if len(os.fsencode(part)) > MAX_NAME_BYTES:
            return f"is longer than {MAX_NAME_BYTES} bytes"
        if not windows:
            continue
        if DEVICE.fullmatch(part):
            return f"has {part} in it, a device of Windows"
        if NOT_ON_WINDOWS.search(part) or part.endswith((".", " ")):
            return 'holds one of < > : " | ? * or ends in a dot or space, which Windows rejects'
    return None


def _files_of_row(row: dict, number: int, count: int, output: Path) -> list[Path]:
    given = row.get("file_name")
    if given in (None, ""):
        given = f"{number:05d}"
    where = f"prompt {number + 1}: file_name"
    try:
        # A table may come from Windows.
        name = PurePosixPath(checked_text("file_name", given).replace("\\", "/"))
    except ValueError as error:
        raise ValueError(f"prompt {number + 1}: {error}") from None
    if name.is_absolute() or ".." in name.parts or PureWindowsPath(name).drive:
        raise ValueError(f"{where} {name} leads out of {output}; give a path within it")
    if not name.name:
        raise ValueError(f"{where} is {str(given)!r}, which names no file")

    stem = name.name[:-4] if name.name.lower().endswith(".png") else name.name
    copies = [f"{stem}-{copy}" for copy in range(count)] if count > 1 else [stem]
    names = [name.with_name(f"{copy}.png") for copy in copies]
    for each in names:
        if fault := name_fault(str(each)):
            shown = str(given) if len(str(given)) < 80 else f"{str(given)[:80]}..."
            raise ValueError(f"{where} {shown!r} {fault}")
    return [output / each for each in names]


def _reject_clashes(files: list[list[Path]]) -> None:
    """Raise ValueError where two images have one file, or one has the folder of another."""
    numbers: dict[str, int] = {}
    for number, row_files in enumerate(files, 1):
        for file in row_files:
            if _as_stored(file) in numbers:
                raise ValueError(
                    f"prompt {number}: two prompts have the same file_name, {file.name}; give each"
                    " its own"
                )
            numbers[_as_stored(file)] = number
    for number, row_files in enumerate(files, 1):
        for folder in {folder for file in row_files for folder in file.parents}:
            if other := numbers.get(_as_stored(folder)):
                raise ValueError(
                    f"prompt {number}: file_name needs a folder {folder}, where the image of prompt"
                    f" {other} goes; give another"
                )


def _as_stored(file: Path) -> str:
    """What a file system takes for the same name: accents in either form, case where it ignores
    it."""
    name = normalize("NFC", str(file))
    return name.casefold() if sys.platform in ("win32", "darwin") else name


def _unwritable(file: Path) -> str | None:
    """Why a file can't be written there; None where nothing is against it."""
    if len(os.fsencode(file.absolute())) > MAX_PATH_BYTES:
        return f"its path is longer than {MAX_PATH_BYTES} bytes"
    try:
        if file.is_dir():
            return "it is a folder"
        nearest = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
        if not nearest.is_dir():
            return f"{nearest} is no folder"
    except (OSError, ValueError) as error:
        return str(error)
    return None
