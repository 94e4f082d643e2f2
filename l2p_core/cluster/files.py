"""Image files that actors write to a shared folder, or send to the machine that asked for them."""

from io import BytesIO
from pathlib import Path

from PIL import Image

from ..files.atomic import atomic_write
from ..images import save_image, write_png


def write_or_pack(image: Image.Image, file: Path, record: dict, collect: bool) -> bytes | None:
    """In an actor: write an image with its record, or return its PNG to collect it."""
    if not collect:
        save_image(image, file, record)
        return None
    stream = BytesIO()
    write_png(image, stream, record)
    return stream.getvalue()


def keep(file: Path, png: bytes | None) -> None:
    """Write an image that an actor sent, or find the one that it wrote. Raises ValueError."""
    if png is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as stream:
            stream.write(png)
    elif not is_visible(file):
        raise ValueError(
            f"{file} was written on another machine and is not here: the folder is not shared."
            " Give --collect, and the images are sent here"
        )


def is_visible(file: Path) -> bool:
    """Whether a file is there that another machine wrote. A network file system may remember that
    it was not, until the folder is listed."""
    return file.exists() or file in file.parent.glob("*")
