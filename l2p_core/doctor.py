"""`l2p doctor`: is this installation right, and are these weights? A report to paste into an
issue."""

import math
import os
import platform
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .config import PUBLISHED_DECODERS, L2PConfig
from .devices import default_device, free_memory, synchronize
from .estimate import needs
from .files.header import CheckpointError, read_header
from .files.layout import Layout, read_layout
from .files.load import check, load_model
from .images import open_image, to_pixels
from .meter import peak_on
from .pipeline import BUNDLED_MODEL, L2PPipeline
from .proof import AFTER_SCALE, SCENE_PROMPT, Finding, Probe, draw_scene, prove, untested
from .shapes import scenes
from .tokenizer import find_tokenizer

PACKAGES = ("torch", "tokenizers", "safetensors", "Pillow", "numpy")
EXTRAS = {
    "int8": "comfy-kitchen",
    "queue": "websocket-client",
    "offload and synthesize": "diffusers",
    "train": "accelerate",
    "LoRA training": "peft",
    "low-memory": "bitsandbytes",
}
RECORDED = BUNDLED_MODEL / "recorded.png"
RECORDED_PROMPT = "a large red circle on a blue background, left"
NEAR = 2.0  # levels, root mean square, to the recorded image
TOKENS = 16  # a side, for the proof on a CPU: 256 pixels in patches of 16
QWEN3_4B = {"tensors": 398, "width": L2PConfig.cap_feat_dim}
INT8_LIMIT = 0.1  # of the velocity, between two checkpoints of one model


def examine(
    checkpoint: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = torch.bfloat16,
    convrot_groupsize: int | None = None,
    image: str | Path | None = None,
    prompt: str | None = None,
    other: str | Path | None = None,
) -> Iterator[Finding]:
    """Yield the findings about this installation, or about a checkpoint where one is given.

    image, prompt: what the proof denoises; by default a scene that is rendered. other: a second
    checkpoint of the same model, whose velocity is compared, such as INT8 against BF16."""
    yield from environment()
    if checkpoint is None:
        yield recorded_image(device)
    yield from examine_checkpoint(
        checkpoint,
        text_encoder,
        tokenizer,
        device,
        dtype,
        convrot_groupsize,
        image,
        prompt,
        other,
    )


def report(findings: Iterable[Finding]) -> str:
    """Return the findings as lines, and the verdict below them."""
    found = list(findings)
    return "\n".join([*map(str, found), verdict(sum(each.ok is False for each in found))])


def verdict(failed: int) -> str:
    """Return what so many failed findings come to."""
    return f"{failed} test{'s' * (failed > 1)} failed" if failed else "all tests passed"


def environment() -> Iterator[Finding]:
    """Yield what is installed here."""
    found = [f"{name} {installed(name) or 'missing'}" for name in PACKAGES]
    yield Finding("versions", True, f"Python {platform.python_version()}, {', '.join(found)}")
    extras = [
        f"{name}: {package} {installed(package) or 'missing'}" for name, package in EXTRAS.items()
    ]
    yield Finding("extras", None, ", ".join(extras))
    yield Finding("system", None, f"{platform.platform()}, {os.cpu_count()} cores")
    yield Finding("device", None, describe_device(default_device()))
    yield Finding("kernels", None, describe_kernels(default_device()))
    yield Finding("ComfyUI", None, find_comfyui())


def installed(package: str) -> str | None:
    """Return a package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe_device(device: torch.device) -> str:
    """Return the name and the memory of the device that is used by default."""
    free = free_memory(device)
    if device.type == "cpu":
        return f"cpu, torch threads: {torch.get_num_threads()}; no accelerator that torch can use"
    about = getattr(torch, device.type)
    name = about.get_device_name(device) if hasattr(about, "get_device_name") else device.type
    memory = "memory not known" if free is None else f"{free / 1e9:.1f} GB free"
    runtime = torch.version.hip or torch.version.cuda or ""
    return f"{device.type} {runtime}: {name}, {memory}"


def describe_kernels(device: torch.device) -> str:
    """Return whether flash attention runs here, and whether the INT8 kernels are there."""
    flash = "flash attention runs" if flash_runs(device) else "flash attention does not run"
    kitchen = installed("comfy-kitchen")
    return f"{flash}, {'INT8 by comfy-kitchen ' + kitchen if kitchen else 'no INT8 kernels'}"


def flash_runs(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Try flash attention at the published head size."""
    q = torch.zeros(1, 2, 64, 128, device=device, dtype=dtype)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            torch.nn.functional.scaled_dot_product_attention(q, q, q)
    except RuntimeError:
        return False
    return True


def find_comfyui() -> str:
    """Return where a ComfyUI is and which version it has."""
    given = os.environ.get("COMFYUI_PATH")
    places = [Path(given)] if given else [*Path(__file__).parents, Path.home() / "comfy/ComfyUI"]
    for place in places:
        file = place / "comfyui_version.py"
        if file.is_file():
            number = re.search(r'__version__ = "([^"]+)"', file.read_text(encoding="utf-8"))
            return f"v{number[1] if number else '?'} at {place}"
    return "none at $COMFYUI_PATH, in a folder above, or at ~/comfy/ComfyUI"


def recorded_image(device: str | None) -> Finding:
    """Generate an image with the bundled model, and compare it with the recorded one."""
    pipe = L2PPipeline.from_pretrained(device=device, torch_dtype=torch.float32)
    started = time.perf_counter()
    image = pipe(RECORDED_PROMPT, seed=42)
    seconds = time.perf_counter() - started
    with open_image(RECORDED, ("PNG",)) as recorded:
        expected = np.asarray(recorded.convert("RGB")).astype(float)
    apart = float(np.sqrt(np.square(np.asarray(image) - expected).mean()))
    detail = f"differs by {apart:.2f} levels from the recorded one, generated in {seconds:.1f} s"
    if apart > NEAR:
        detail += f"; expected at most {NEAR}. This torch computes wrong results on this device"
    return Finding("bundled image", apart <= NEAR, detail)


def examine_checkpoint(
    checkpoint: str | Path | None,
    text_encoder: str | Path | None,
    tokenizer: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    convrot_groupsize: int | None = None,
    image: str | Path | Image.Image | None = None,
    prompt: str | None = None,
    other: str | Path | None = None,
) -> Iterator[Finding]:
    """Yield the findings about a checkpoint: its file, its text encoder, what it predicts, what it
    takes."""
    rest = ("text encoder", "scale", *AFTER_SCALE)
    try:
        pipe = L2PPipeline.from_pretrained(
            checkpoint, text_encoder, tokenizer, device, dtype, convrot_groupsize
        )
        yield Finding("file", True, describe_file(pipe.layout))
    except CheckpointError as error:
        yield Finding("file", False, str(error))
        yield from untested(*rest)
        return
    yield published(pipe.layout)

    height, width = proof_size(pipe)
    try:
        yield examine_text_encoder(pipe)
        scene, caption = proof_scene(pipe, image, prompt, height, width)
        embeds, nothing = pipe.encode_prompt(caption), pipe.encode_prompt("")
        yield Finding("encoding", True, f"{len(embeds)} tokens from {caption[:60]!r}")
        pipe.unload_text_encoder()
    except CheckpointError as error:
        yield Finding("text encoder", False, str(error))
        yield from untested(*rest[1:])
        return

    settings = pipe.complete({"height": height, "width": width})
    pipe.adopt(pipe.place(settings, 1, free_text_encoder=True))
    started = time.perf_counter()
    try:
        model = pipe.transformer
    except CheckpointError as error:
        yield Finding("weights", False, str(error))
        yield from untested(*rest[1:])
        return
    seconds = time.perf_counter() - started
    yield Finding("weights", True, f"complete, without NaN, loaded in {seconds:.1f} s")

    embeds, nothing = embeds.to(pipe.device), nothing.to(pipe.device)
    probe = Probe(model, to_pixels(scene), embeds, nothing)
    findings = prove(probe)
    yield from findings
    yield measure_pass(pipe, probe)
    if other is not None:
        if all(each.ok is not False for each in findings):
            yield compare(pipe, probe, other)
        else:
            yield from untested("other file")


def describe_file(layout: Layout) -> str:
    """Return size, tensors and dtypes in one line."""
    size = sum(file.stat().st_size for file in layout.files)
    dtypes = Counter(entry.dtype for entry in layout.entries.values())
    told = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    return (
        f"{size / 1e9:.2f} GB, {len(layout.entries)} tensors ({told}), {layout.naming} tensor names"
    )


def published(layout: Layout) -> Finding:
    """Say which published file this is, by tensors, dtypes and sizes, or how it differs."""
    config, name = layout.config, "published as"
    sizes = {"1K": 16, "4K": 64, "8K": 128, "10K": 160}
    for label, patch in sizes.items():
        if config != L2PConfig(patch_size=patch, decoder=PUBLISHED_DECODERS[patch]):
            continue
        dtypes = {key: source.entry.dtype for key, source in layout.tensors.items()}
        if label == "1K" and layout.naming == "published" and not layout.quantization:
            odd = [key for key, dtype in dtypes.items() if dtype != dtype_in_1k(key)]
            if not odd:
                return Finding(name, True, "model-1k-merge: names, shapes and dtypes agree")
            detail = (
                f"the 1K model, with {len(odd)} tensors of another dtype than model-1k-merge"
                f" (first: {odd[0]} is {dtypes[odd[0]]}, expected {dtype_in_1k(odd[0])})"
            )
            return Finding(name, None, detail)
        quantized = f", {layout.quantization}" if layout.quantization else ""
        return Finding(name, True, f"the {label} model: names and shapes agree{quantized}")
    return Finding(
        name,
        None,
        f"none of the published files: patch {config.patch_size}, width {config.dim},"
        f" {config.n_layers} layers",
    )


def dtype_in_1k(name: str) -> str:
    """Return the dtype of a tensor in model-1k-merge: its frozen layers 5 to 24 are FP32."""
    layer = re.match(r"layers\.(\d+)\.", name)
    return "F32" if layer and 5 <= int(layer[1]) <= 24 else "BF16"


def examine_text_encoder(pipe: L2PPipeline) -> Finding:
    """Compare the text encoder's tensors with Qwen3-4B's, and its width with the checkpoint's."""
    from .text import encoder_files

    files = encoder_files(pipe.text_encoder_path)
    entries = {key: entry for file in files for key, entry in read_header(file)[0].items()}
    embedding = next((key for key in entries if key.endswith("embed_tokens.weight")), None)
    if embedding is None:
        raise CheckpointError(
            f"{pipe.text_encoder_path} is not a text encoder: it lacks embed_tokens. Give the"
            " text_encoder/ folder of Tongyi-MAI/Z-Image-Turbo"
        )
    config = pipe.layout.config
    width = entries[embedding].shape[-1]
    wanted = config.cap_feat_dim // len(config.prompts.hidden_states)
    if width != wanted:
        raise CheckpointError(
            f"the text encoder has width {width}; this checkpoint needs {wanted}. Give the one that"
            " it was trained with"
        )
    find_tokenizer(pipe.text_encoder_path, pipe.tokenizer_path)
    dtypes = "/".join(sorted({entry.dtype for entry in entries.values()}))
    count = len([key for key in entries if not key.startswith("lm_head")])
    detail = f"{count} tensors, {dtypes}, width {width}"
    if width == QWEN3_4B["width"] and count != QWEN3_4B["tensors"]:
        detail += f"; Qwen3-4B has {QWEN3_4B['tensors']}"
        return Finding("text encoder", False, f"{detail}. Get it again")
    return Finding("text encoder", True, detail)


def proof_size(pipe: L2PPipeline) -> tuple[int, int]:
    """Return height and width of the proof: the trained resolution, on a CPU at most 16 tokens a
    side."""
    if knows_shapes_only(pipe.layout):
        return scenes.SIZE, scenes.SIZE
    height, width = pipe.layout.trained_size
    if pipe.device.type != "cpu":
        return height, width
    multiple = pipe.layout.config.size_multiple
    most = math.ceil(TOKENS * pipe.layout.config.patch_size / multiple) * multiple
    return min(height, most), min(width, most)


def knows_shapes_only(layout: Layout) -> bool:
    """Whether it is a small model of the shapes world: published ones take Qwen3-4B's prompts."""
    return layout.config.text_encoder is None


def proof_scene(
    pipe: L2PPipeline,
    image: str | Path | Image.Image | None,
    prompt: str | None,
    height: int,
    width: int,
) -> tuple[Image.Image, str]:
    """Return the image that is denoised, and its prompt: the user's, else a rendered scene."""
    if isinstance(image, Image.Image):
        return image.convert("RGB").resize((width, height)), prompt or ""
    if image is not None:
        with open_image(image) as opened:
            return opened.convert("RGB").resize((width, height)), prompt or ""
    if knows_shapes_only(pipe.layout):
        scene = scenes.test_scenes(1)[0]
        return scenes.render(scene), scene.caption() if prompt is None else prompt
    return draw_scene(height, width), SCENE_PROMPT if prompt is None else prompt


def measure_pass(pipe: L2PPipeline, probe: Probe) -> Finding:
    """Measure seconds and memory of one pass, and compare the memory with the estimate."""
    height, width = probe.image.shape[-2:]
    settings = pipe.complete({"height": height, "width": width, "cfg_scale": 1.0})
    expected = needs(pipe, settings, 1).passing(pipe.decoder_tile)
    synchronize(probe.device)
    started = time.perf_counter()
    probe.run(0.5)
    synchronize(probe.device)
    seconds = time.perf_counter() - started
    peak = peak_on(probe.device, lambda: probe.run(0.5))
    return Finding(
        "one pass",
        None,
        f"{width} x {height}: {seconds:.2f} s, {peak / 1e9:.3f} GB of memory without the weights;"
        f" the estimate for the longest prompt is {expected / 1e9:.3f} GB",
    )


def compare(pipe: L2PPipeline, probe: Probe, other: str | Path) -> Finding:
    """Compare the velocity with that of a second checkpoint of the same model."""
    x = (probe.image + probe.noise) / 2
    t = torch.tensor([0.5], device=probe.device)
    started = time.perf_counter()
    ours = velocity_of(probe, x, t)
    first = time.perf_counter() - started
    try:
        layout = read_layout(other)
        check(layout)
        if layout.config != pipe.layout.config:
            raise CheckpointError(
                f"{layout.path.name} has other tensor shapes; expected the same model"
            )
        pipe.__dict__.pop("transformer")
        probe.model = load_model(layout, pipe.device, pipe.dtype)
    except CheckpointError as error:
        return Finding("other file", False, str(error))
    started = time.perf_counter()
    theirs = velocity_of(probe, x, t)
    second = time.perf_counter() - started
    apart = ((ours - theirs).norm() / ours.norm()).item()
    detail = (
        f"{layout.path.name}: its velocity differs by {apart:.1%}; a pass takes {second:.2f} s,"
        f" and {first:.2f} s with the first file"
    )
    return Finding("other file", apart <= INT8_LIMIT, detail)


def velocity_of(probe: Probe, x: Tensor, t: Tensor) -> Tensor:
    """One pass with the prompt, in float32."""
    with torch.no_grad():
        velocity = probe.model(x, t, [probe.prompt]).float()
    synchronize(probe.device)
    return velocity
