"""What a client may ask for: OpenAI's fields, this project's settings, and the limits."""

import hashlib
import random
import re
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, create_model

from ..batch import Job
from ..images import open_image, read_image
from ..pipeline import L2PPipeline
from ..settings import FIELDS, describe, kind

# Files of the server, and a device that the operator chooses: no client may name them.
PRIVATE = ("input_image", "inpaint_mask", "rand_device")
SETTINGS = [name for name in FIELDS if name != "prompt" and name not in PRIVATE]
EDIT_STRENGTH = 0.7  # denoising strength of an edit without a mask; 1 would keep nothing
MAX_PROMPT = 10_000  # characters
NO_FILE = Path()  # nothing is written
SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


class Rejected(ValueError):
    """A request that can't be served. status: of HTTP. param: the field at fault."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for, and the most that may wait."""

    side: int  # pixels of height and width
    steps: int = 100  # over all stages of an image
    images: int = 10  # of one request
    queue: int = 200  # images that wait
    upload: int = 20_000_000  # bytes of one request
    upload_pixels: int = 25_000_000  # of one uploaded image
    uploads: int = 1_000_000_000  # bytes of all decoded images that wait


@dataclass(frozen=True)
class Order:
    """What a worker needs to generate one image; it can be pickled."""

    job: Job
    files: dict[str, Image.Image] = field(default_factory=dict)  # input_image, inpaint_mask
    previews: int = 0  # x0 predictions to send along the way
    input_hashes: dict[str, str] = field(default_factory=dict)  # SHA-256 of what was uploaded


def held_bytes(orders: list[Order]) -> int:
    """Bytes of the decoded images that these orders hold; those of one request share them."""
    shared = {id(order.files): order.files for order in orders}
    return sum(
        image.width * image.height * len(image.getbands())
        for files in shared.values()
        for image in files.values()
    )


class OpenAIFields(BaseModel):
    """The fields of OpenAI's images API."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: str = Field(max_length=MAX_PROMPT, description="What to generate.")
    model: str | None = Field(None, description="The served model, or nothing. See /v1/models.")
    n: int = Field(1, ge=1, description="Number of images. Each further image adds 1 to the seed.")
    size: str | None = Field(
        None, description='"WIDTHxHEIGHT", or "auto" for the trained resolution.'
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description='"url" gives a data: URL; no file is stored.'
    )
    output_format: Literal["png", "jpeg", "webp"] = Field(
        "png", description="Only a PNG carries its settings."
    )
    output_compression: int = Field(95, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(
        0, ge=0, le=10, description="Previews to stream: the x0 prediction at that many steps."
    )
    progress: bool = Field(
        False,
        description="Stream l2p.progress events too: the place in the queue, and the steps done.",
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="Has no effect.")
    quality: str | None = Field(None, description="Has no effect; see num_inference_steps.")
    style: str | None = Field(None, description="Has no effect.")
    moderation: str | None = Field(None, description="Has no effect; nothing is filtered.")
    input_fidelity: str | None = Field(None, description="Has no effect; see denoising_strength.")
    user: str | None = Field(None, description="Has no effect.")


def _setting(name: str) -> Any:
    """The type and description of a setting, for the model below; `pipe.complete` checks it."""
    text = describe(name)
    if name == "seed":
        text = f"{FIELDS[name].metadata['help']} (default: a random one)"
    return (kind(name) | None, Field(None, description=text))


ImageRequest: Any = create_model(
    "ImageRequest", __base__=OpenAIFields, **{name: _setting(name) for name in SETTINGS}
)


def make_orders(
    request: Any,
    pipe: L2PPipeline,
    limits: Limits,
    image: bytes | None = None,
    mask: bytes | None = None,
) -> list[Order]:
    """Return one order for each image of a request, everything checked.

    request: an `ImageRequest`. image, mask: uploaded files, to edit. Raises Rejected."""
    if request.n > limits.images:
        raise Rejected(f"n is {request.n}; expected at most {limits.images}", "n")
    files = read_uploads(image, mask, limits)
    values = requested_settings(request)
    if files and "inpaint_mask" not in files:
        values.setdefault("denoising_strength", EDIT_STRENGTH)
    try:
        settings = pipe.complete(values, files.get("input_image"))
        check_limits(settings.height, settings.width, limits)
        plan = pipe.plan_stages(settings)
    except Rejected:
        raise
    except ValueError as error:
        raise Rejected(str(error), str(error).split(" ")[0]) from None
    steps = sum(stage.steps for stage in plan)
    if max(steps, settings.num_inference_steps) > limits.steps:
        raise Rejected(
            f"the image takes {max(steps, settings.num_inference_steps)} steps; expected at most"
            f" {limits.steps}",
            "num_inference_steps",
        )
    if settings.seed + request.n - 1 > FIELDS["seed"].metadata["high"]:
        raise Rejected("seed + n is above 2^64; give a smaller seed", "seed")

    hashes = {}
    if image is not None:
        settings = replace(settings, input_image="image")
        hashes["input_image"] = hashlib.sha256(image).hexdigest()
    if "inpaint_mask" in files:
        settings = replace(settings, inpaint_mask="mask")
        hashes["inpaint_mask"] = hashlib.sha256(mask or image or b"").hexdigest()
    orders = []
    for seed in range(settings.seed, settings.seed + request.n):
        prompt = pipe.read_prompt(settings.prompt, seed)
        job = Job(output=NO_FILE, settings=replace(settings, seed=seed), prompt=prompt)
        orders.append(Order(job, files, request.partial_images, hashes))
    return orders


def requested_settings(request: Any) -> dict[str, Any]:
    """The settings that a request names. Raises Rejected for a size that is none."""
    values = {name: value for name in SETTINGS if (value := getattr(request, name)) is not None}
    values["prompt"] = request.prompt
    values.setdefault("seed", random.randrange(2**32))
    if request.size not in (None, "", "auto"):
        found = SIZE.fullmatch(request.size)
        if not found:
            raise Rejected(f"size is {request.size!r}; expected WIDTHxHEIGHT or auto", "size")
        values["width"], values["height"] = int(found[1]), int(found[2])
    return values


def check_limits(height: int, width: int, limits: Limits) -> None:
    """Raise Rejected for an image that is too large."""
    if max(height, width) > limits.side:
        raise Rejected(
            f"the size is {width}x{height}; expected at most {limits.side} pixels a side", "size"
        )


def read_uploads(image: bytes | None, mask: bytes | None, limits: Limits) -> dict[str, Image.Image]:
    """Decode the uploaded input image and mask.

    Transparent parts of the mask are generated, as in OpenAI's API; without a mask those of the
    image are. Returns input_image, and inpaint_mask where there is one. Raises Rejected."""
    if image is None:
        return {}
    source = decode_upload(image, "image", limits)
    if mask is None:
        hole = transparency(source)
        if hole is None or not hole.getbbox():
            return {"input_image": source.convert("RGB")}
        return {"input_image": source.convert("RGB"), "inpaint_mask": hole}
    hole = transparency(decode_upload(mask, "mask", limits))
    if hole is None:
        raise Rejected(
            "mask has no transparency; give a PNG that is transparent where the image is to be"
            " generated",
            "mask",
        )
    if hole.size != source.size:
        raise Rejected(
            f"mask is {hole.width}x{hole.height} and image {source.width}x{source.height}; give"
            " both the same size",
            "mask",
        )
    return {"input_image": source.convert("RGB"), "inpaint_mask": hole}


def transparency(image: Image.Image) -> Image.Image | None:
    """White where an image is transparent; None where it can't be."""
    if not image.has_transparency_data:
        return None
    return ImageOps.invert(image.convert("RGBA").getchannel("A"))


def decode_upload(data: bytes, name: str, limits: Limits) -> Image.Image:
    """Decode an uploaded image of a bounded number of pixels. Raises Rejected."""
    try:
        with open_image(BytesIO(data), name=name) as opened:
            width, height = opened.size
        if width * height > limits.upload_pixels:
            raise Rejected(
                f"{name} is {width}x{height}; expected at most {limits.upload_pixels:,} pixels",
                name,
            )
        return read_image(BytesIO(data), None, name)
    except Rejected:
        raise
    except ValueError as error:
        raise Rejected(str(error), name) from None
