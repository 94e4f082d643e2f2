"""Images: files, 8-bit levels, and pixels as the model takes them, float32 in [-1, 1].

Every image file is read by `read_image`, which checks it, decodes it whole and turns it upright."""

import json
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, PngImagePlugin
from torch import Tensor

from .files.atomic import atomic_write
from .files.content import HEAD_BYTES, identify

PNG_KEY = "l2p"  # the text chunk that carries an image's settings as JSON

# Pillow hands EPS to Ghostscript, an interpreter of programs, whatever the file's name. So it tries
# these formats only.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")

# Of one decoded image. The largest that the published models generate, 10240 x 10240 pixels, takes
# 420 MB, and twice that where its decoder keeps a copy.
MAX_DECODED_BYTES = 900_000_000
BACKGROUND = "white"  # what shows through the transparent parts of images

TURNS = {  # EXIF orientation → what turns the image upright (EXIF 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
COLOUR_TOLERANCE = 8  # levels within which colours count as the same

_pillow_limit = Lock()


def open_image(
    source: str | Path | BytesIO, formats: tuple[str, ...] = FORMATS, name: object = None
) -> Image.Image:
    """Open an image of one of these formats; little more than its header is read yet.

    name: what messages call it, by default its path. Raises ValueError, with the reason, where it
    is missing, of another format or damaged."""
    name = source if name is None else name
    if not isinstance(source, BytesIO) and not _is_file(source):  # a FIFO would wait for ever
        raise ValueError(f"there is no {name}")
    Image.init()
    known = [each for each in formats if each in Image.OPEN]
    with _readable(name):
        try:
            with _without_pillows_limit():
                return Image.open(source, formats=known)
        except Image.UnidentifiedImageError:
            raise ValueError(_instead_of_image(source, known)) from None


def read_image(
    source: str | Path | BytesIO, background: str | None = BACKGROUND, name: object = None
) -> Image.Image:
    """Read an image whole, upright, with 8 bits a channel: L or RGB.

    background: the colour that shows through transparent parts; None keeps them, as LA or RGBA.
    name: what messages call it, by default its path. Raises ValueError, with the reason, where it
    is missing or no readable image."""
    name = source if name is None else name
    with open_image(source, name=name) as image, _readable(name):
        _decode(image)
        turn = TURNS.get(_orientation(image))
        image = eight_bits(image)
        if turn is not None:
            image = image.transpose(turn)
        return image if background is None else flatten(image, background)


def check_image(file: str | Path) -> tuple[int, int]:
    """Return the height and width of an image, upright, once all of it was decoded.

    It takes `decoded_bytes` at most. Raises ValueError where `read_image` would."""
    with open_image(file) as image, _readable(file):
        _decode(image)
        if image.mode == "F" or image.mode.startswith("I"):
            eight_bits(image)
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the height and width of an opened image as it is shown, by its EXIF orientation."""
    lies = _orientation(image) in (5, 6, 7, 8)
    return (image.width, image.height) if lies else (image.height, image.width)


def decoded_bytes(image: Image.Image) -> int:
    """Return about how many bytes decoding an opened image takes at its peak.

    Pillow keeps 4 bytes a pixel. Some decoders hold the whole image a second time, and numbers of
    more than 8 bits are converted."""
    if image.mode == "F" or image.mode.startswith("I"):
        copies = 3
    elif image.format in ("WEBP", "AVIF") or "progressive" in image.info:
        copies = 2
    else:
        copies = 1
    return image.width * image.height * 4 * copies


def is_whole_png(image: Image.Image) -> bool:
    """Return True where an open PNG is undamaged up to its end; it can't be used
    afterwards."""
    try:
        image.verify()
        return True
    except (OSError, SyntaxError, ValueError, struct.error):
        return False


def eight_bits(image: Image.Image) -> Image.Image:
    """Return an image of any mode as L, LA, RGB or RGBA. Raises ValueError for numbers whose black
    and white are not known."""
    if image.mode == "F":
        return _from_fractions(image)
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        return image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def flatten(image: Image.Image, background: str = BACKGROUND) -> Image.Image:
    """Return the image, of 8 bits a channel, on a background of that colour: L or RGB."""
    if image.mode not in ("LA", "RGBA"):
        return image
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert(image.mode[:-1])
    under = Image.new("RGBA", image.size, (*ImageColor.getrgb(background)[:3], 255))
    return Image.alpha_composite(under, image.convert("RGBA")).convert("RGB")


def _instead_of_image(source: str | Path | BytesIO, known: list[str]) -> str:
    """What a file is that is no image of these formats, in words."""
    if isinstance(source, BytesIO):
        found = identify(source.getvalue()[:HEAD_BYTES])
    else:
        with Path(source).open("rb") as stream:
            found = identify(stream.read(HEAD_BYTES))
    expected = f"it is not a {', '.join(known)} image"
    return f"{expected} but {found.name}. {found.advice}" if found else expected


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _decode(image: Image.Image) -> None:
    if decoded_bytes(image) > MAX_DECODED_BYTES:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, which take"
            f" {decoded_bytes(image) / 1e9:.1f} GB to decode; expected at most"
            f" {MAX_DECODED_BYTES / 1e9:.1f} GB. Resize it"
        )
    image.load()


@contextmanager
def _readable(name: object) -> Iterator[None]:
    """Turn whatever Pillow raises for a damaged file into a sentence."""
    try:
        yield
    except MemoryError:
        raise ValueError(f"{name} is not a readable image: it takes too much memory") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} is not a readable image: {reason}") from None


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Pillow rejects images of more than 179 million pixels as they are opened, and has one limit
    for the whole program. Ours counts where the pixels are decoded."""
    with _pillow_limit:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a decoded image, 1 where it has none or can't be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever Pillow makes of damaged EXIF data
        return 1
    return orientation if isinstance(orientation, int) else 1


def _from_fractions(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    low, high = float(levels.min()), float(levels.max())
    if not (low >= 0 and high <= 1):  # also where a number is NaN
        raise ValueError(
            f"its values go from {low:g} to {high:g}; expected 0 (black) to 1 (white). Save it"
            " with 8 or 16 bits a channel"
        )
    return Image.fromarray((levels * 255).round().astype(np.uint8))


def _from_16_bits(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    if bits > 16 or tags.get(ExifTags.Base.SampleFormat, (1,))[0] != 1:
        raise ValueError(
            f"its values are {bits}-bit integers, and nothing says which are black and white. Save"
            " it with 8 or 16 bits a channel"
        )
    levels = np.asarray(image).clip(0, 2**bits - 1) >> (bits - 8)
    return Image.fromarray(levels.astype(np.uint8))


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


def to_pixels(image: Image.Image, dtype: torch.dtype = torch.float32) -> Tensor:
    """(1, 3, H, W) in [-1, 1]: level * (2 / 255) - 1. In bfloat16 it rounds twice, as the published
    pipeline does. Transparent parts are white."""
    levels = torch.from_numpy(np.array(flatten(eight_bits(image)).convert("RGB")))
    return levels.permute(2, 0, 1)[None].to(dtype) * (2 / 255) - 1


def to_levels(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) about [-1, 1] → (B, H, W, 3) uint8, clamped, halves rounded to even."""
    levels = ((pixels.float() + 1) / 2).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) → B RGB images."""
    return [Image.fromarray(levels) for levels in to_levels(pixels).cpu().numpy()]


def to_mask(mask: Image.Image) -> Tensor:
    """(1, 1, H, W) in [0, 1]; white, 1, is generated. Transparency counts, see `mask_levels`."""
    return torch.from_numpy(np.array(mask_levels(mask)))[None, None].float() / 255


def mask_levels(mask: Image.Image, image: Image.Image | None = None) -> Image.Image:
    """Return an inpainting mask as levels (L): white is generated, black is kept.

    A mask without transparency is its luminance. Where transparency varies, one of these holds,
    and a warning says which: strokes of one colour on transparent ground are generated where they
    are opaque; an image with transparent holes, as ComfyUI's mask editor saves it, is generated in
    the holes; of anything else it is luminance times opacity. image: what is inpainted, by which a
    image with holes is recognised. Raises ValueError where all of the mask is transparent."""
    mask = eight_bits(mask)
    if mask.mode not in ("LA", "RGBA"):
        return mask.convert("L")
    luminance, alpha = mask.convert(mask.mode[:-1]).convert("L"), mask.getchannel("A")
    low, high = alpha.getextrema()
    if high == 0:
        raise ValueError("the inpaint_mask is completely transparent; paint the part to generate")
    if low == high:
        return luminance

    colours = np.asarray(mask.convert("RGB"))[np.asarray(alpha) > 0].astype(int)  # (N, 3)
    one_colour = np.ptp(colours, axis=0).max() <= COLOUR_TOLERANCE
    is_grey = np.ptp(colours, axis=1).mean() <= COLOUR_TOLERANCE
    if one_colour and is_grey:
        return _told(alpha, "what is opaque in it is generated")
    if _shows(mask, image) or not one_colour and not is_grey:
        return _told(alpha.point(lambda level: 255 - level), "its transparent holes are generated")
    if one_colour:
        return _told(alpha, "what is opaque in it is generated")
    product = np.asarray(luminance).astype(int) * np.asarray(alpha)
    levels = (product / 255).round().astype(np.uint8)
    return _told(Image.fromarray(levels), "what is white and opaque in it is generated")


def _shows(mask: Image.Image, image: Image.Image | None) -> bool:
    """Whether what is opaque in the mask is the image that it belongs to."""
    if image is None:
        return False
    opaque = np.asarray(mask.getchannel("A")) == 255
    there = flatten(eight_bits(image)).convert("RGB").resize(mask.size)
    difference = np.abs(np.asarray(mask.convert("RGB")).astype(int) - np.asarray(there))
    return bool(opaque.any() and difference[opaque].mean() <= COLOUR_TOLERANCE)


def _told(levels: Image.Image, how: str) -> Image.Image:
    # From one place, so that it is said once, however often the mask is read.
    warnings.warn(f"inpaint_mask has transparent parts: {how}", stacklevel=1)
    return levels


def size_for(
    height: float,
    width: float,
    multiple: int,
    wanted_height: int | None = None,
    wanted_width: int | None = None,
) -> tuple[int, int]:
    """Height and width nearest to an image's in multiples of `multiple`; where one is wanted
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
                f"{name} is {size}; this checkpoint needs multiples of {multiple} pixels. Nearest:"
                f" {nearest}"
            )
