"""Identify a file by its first bytes, whatever its name."""

import re
from pathlib import Path
from typing import NamedTuple

HEAD_BYTES = 1024  # as much of a file as `identify` looks at


class Content(NamedTuple):
    """What a file holds, in words, and what to do about it."""

    name: str
    advice: str


AGAIN = "Download the file again"
UNPACK = "Unpack it, and give the file in it"
SAFETENSORS = "Use the .safetensors version of the model"
NO_ADVICE = "Give the file that was meant"

LFS_POINTER = Content(
    "a Git LFS pointer, a small text that stands for the file",
    "Download the file itself: run `git lfs pull` in the repository, or use the model's web page",
)
WEB_PAGE = Content(
    "a web page (HTML)",
    f"{AGAIN}; open its address in a browser to see whether it asks you to log in or to accept a"
    " licence",
)
JSON_TEXT = Content("a JSON text, such as a server's error message", AGAIN)
XML_TEXT = Content("an XML text, such as a server's error message", AGAIN)
PLAIN_TEXT = Content("plain text, such as a server's error message", AGAIN)
ZEROS = Content("nothing but zeros: its download or copy was aborted", AGAIN)
PICKLE = Content("a PyTorch pickle, which can run any code when loaded", SAFETENSORS)
GGUF = Content("a GGUF file, which this program does not read", SAFETENSORS)
WORKBOOK = Content("an Excel workbook", "Save it as CSV UTF-8")

# First bytes → what they begin.
SIGNATURES: tuple[tuple[bytes, Content], ...] = (
    (b"version https://git-lfs", LFS_POINTER),
    (b"GGUF", GGUF),
    (b"\x89HDF\r\n", Content("an HDF5 file, which this program does not read", SAFETENSORS)),
    (b"\x1f\x8b", Content("a gzip archive", UNPACK)),
    (b"7z\xbc\xaf\x27\x1c", Content("a 7z archive", UNPACK)),
    (b"Rar!\x1a\x07", Content("a RAR archive", UNPACK)),
    (b"BZh", Content("a bzip2 archive", UNPACK)),
    (b"\xfd7zXZ\0", Content("an xz archive", UNPACK)),
    (b"\x28\xb5\x2f\xfd", Content("a zstd archive", UNPACK)),
    (b"\0\x05\x16\x07", Content("a file of macOS's (._NAME), left beside the real one", NO_ADVICE)),
    (b"\0\0\0\x01Bud1", Content("a .DS_Store, which macOS leaves in folders", NO_ADVICE)),
    (b"\xd0\xcf\x11\xe0", Content("a Thumbs.db or an old Office document", NO_ADVICE)),
    (b"[.ShellClassInfo]", Content("a desktop.ini, which Windows leaves in folders", NO_ADVICE)),
    (b"\x89PNG\r\n\x1a\n", Content("a PNG image", NO_ADVICE)),
    (b"\xff\xd8\xff", Content("a JPEG image", NO_ADVICE)),
    (b"GIF8", Content("a GIF image", NO_ADVICE)),
    (b"%PDF", Content("a PDF document", NO_ADVICE)),
    (b"%!PS", Content("a PostScript program", NO_ADVICE)),
    (b"\x7fELF", Content("a program", NO_ADVICE)),
    (b"MZ", Content("a Windows program", NO_ADVICE)),
)
PICKLE_START = re.compile(rb"\x80[\x02-\x05][\x8a\x95}\]()ccq]")  # a protocol, then its first step
TEXT_BYTES = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]+")

# Control characters, and those that change the direction of writing.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

# What operating systems leave beside files: macOS's attributes of NAME are ._NAME.
LEFT_BY_SYSTEMS = re.compile(r"\._.*|\.DS_Store|Thumbs\.db|desktop\.ini", re.IGNORECASE)


def identify(head: bytes) -> Content | None:
    """Return what a file with these first bytes is; None where they tell nothing.

    head: `HEAD_BYTES` of it, or the whole file."""
    if head[4:9] == b"\0\0\0\0{":  # safetensors: the length of a header, and its start
        return None
    for signature, content in SIGNATURES:
        if head.startswith(signature):
            return content

    if head.startswith(b"PK\x03\x04"):
        return _zip(head)
    if PICKLE_START.match(head):
        return PICKLE
    if head[257:262] == b"ustar":
        return Content("a tar archive", UNPACK)
    if head and not head.strip(b"\0"):
        return ZEROS
    return _text(head)


def identify_file(file: Path) -> Content | None:
    """Return what a file is; None where its first bytes tell nothing or can't be read."""
    try:
        with file.open("rb") as stream:
            return identify(stream.read(HEAD_BYTES))
    except OSError:
        return None


def left_by_system(file: Path) -> bool:
    """Return True for files that an operating system leaves beside the real ones."""
    return LEFT_BY_SYSTEMS.fullmatch(file.name) is not None


def printable(text: object) -> str:
    """Return a text with what steers a terminal (but for line ends and tabs) written out: names may
    come from anyone."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def _zip(head: bytes) -> Content:
    if b"/data.pkl" in head or b"/version" in head:
        return PICKLE
    if b"[Content_Types].xml" in head or b"xl/" in head:
        return WORKBOOK
    return Content(
        "a PyTorch pickle or another zip archive, which can run any code when loaded", SAFETENSORS
    )


def _text(head: bytes) -> Content | None:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")):
        return WEB_PAGE
    if start.startswith(b"<"):
        return XML_TEXT
    if not TEXT_BYTES.fullmatch(head):
        return None
    if start.startswith((b"{", b"[")):
        return JSON_TEXT
    return PLAIN_TEXT
