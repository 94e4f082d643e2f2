"""Images: files, 8-bit levels, and pixels as the model takes them, float32 in [-1, 1]."""

import errno
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor

from .files.atomic import atomic_write

PNG_KEY = "l2p"  # the text chunk that carries an image's settings as JSON

# Pillow hands EPS to Ghostscript, an interpreter of programs, whatever the file's name. So it tries
# these formats only.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")


def open_image(file: str | Path | BinaryIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image file, or a stream, of one of these formats; nothing but its header is read yet.

    Raises OSError where it is of another format, damaged or missing, and ValueError where it has
    far too many pixels."""
    if isinstance(file, (str, Path)) and not Path(file).is_file():  # a FIFO would wait for ever
        raise FileNotFoundError(errno.ENOENT, "No such file", str(file))
    Image.init()
    known = [name for name in formats if name in Image.OPEN]
    try:
        return Image.open(file, formats=known)
    except Image.UnidentifiedImageError:
        raise OSError(f"it is not a {', '.join(known)} image") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    except OSError:
        raise
    except Exception as error:  # whatever Pillow makes of a damaged header
        raise OSError(f"its header is damaged ({error})") from None


def save_image(image: Image.Image, output: Path, settings: dict) -> None:
    """Write a PNG with its settings, atomically."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as stream:
        write_png(image, stream, settings)


def write_png(image: Image.Image, stream: BinaryIO, settings: dict) -> None:
    """Write a PNG with its settings to a stream."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(PNG_KEY, json.dumps(settings, ensure_ascii=False))
    image.save(stream, "PNG", pnginfo=info)


def read_image(file: str | Path) -> Image.Image:
    """Read an image file, upright, with 8 bits a channel.

    Raises ValueError, with the reason, where it is missing or no readable image."""
    try:
        with open_image(file) as image:
            return decode(image)
    except FileNotFoundError:
        raise ValueError(f"there is no {file}") from None
    except MemoryError:
        raise
    except Exception as error:  # whatever Pillow makes of a damaged file
        raise ValueError(f"{file} is not a readable image: {error}") from None


def decode(image: Image.Image) -> Image.Image:
    """Decode an opened image: upright, with 8 bits a channel. Raises what Pillow raises where it is
    damaged."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    return image


def to_pixels(picture: Image.Image, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1, 3, H, W) in [-1, 1]: level * (2 / 255) - 1. In bfloat16 it rounds twice, as the published
    pipeline does."""
    levels = torch.from_numpy(np.array(picture.convert("RGB")))
    return levels.permute(2, 0, 1)[None].to(dtype) * (2 / 255) - 1


def to_levels(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) about [-1, 1] → (B, H, W, 3) uint8, clamped, halves rounded to even."""
    levels = ((pixels.float() + 1) / 2).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1)


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) → B RGB pictures."""
    return [Image.fromarray(levels) for levels in to_levels(pixels).cpu().numpy()]


def to_mask(mask: Image.Image) -> Tensor:
    """(1, 1, H, W) in [0, 1]; white, 1, is drawn anew."""
    return torch.from_numpy(np.array(mask.convert("L")))[None, None].float() / 255


def size_for(
    height: float,
    width: float,
    multiple: int,
    wanted_height: int | None = None,
    wanted_width: int | None = None,
) -> tuple[int, int]:
    """Height and width nearest to a picture's in multiples of `multiple`; where one is wanted
    otherwise, the other in proportion."""
    if wanted_height is not None:
        scale = wanted_height / height
    elif wanted_width is not None:
        scale = wanted_width / width
    else:
        scale = 1.0

    def nearest(side: float) -> int:
        return max(round(scale * side / multiple), 1) * multiple

    return (
        nearest(height) if wanted_height is None else wanted_height,
        nearest(width) if wanted_width is None else wanted_width,
    )


def check_size(height: int, width: int, multiple: int) -> None:
    """Raise ValueError, naming the nearest sizes, unless both are positive multiples of `multiple`
    pixels."""
    for name, size in (("height", height), ("width", width)):
        if size < multiple or size % multiple:
            below = size // multiple * multiple
            nearest = f"{below} and {below + multiple}" if below > 0 else str(multiple)
            raise ValueError(
                f"{name} is {size}; this checkpoint draws multiples of {multiple} pixels. Nearest:"
                f" {nearest}"
            )
