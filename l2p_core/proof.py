"""Whether a loaded model denoises: one image, three sigmas, with and without its prompt.

At each sigma the image is mixed with noise and the model runs once. Its x0 prediction has to beat
what needs no model: the noisy image scaled, or blurred and scaled, with the best factor and the
best blur for this very image. Where it fails, or another reading of the file (its time, its tensor
names, its rotation) is clearly better, the fault is named."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .files.quantization import Int8Linear
from .flow import interpolate
from .model import L2PTransformer

SIGMAS = (0.9, 0.6, 0.3)
BLURS = (0, 1, 2, 4, 8, 16)  # standard deviation, pixels
MARGIN = 0.8  # of the best baseline's squared error; the bundled model reaches 0.06 to 0.26
CLEARLY = 0.5  # another reading leaves less than this share of the error
AMPLITUDES = (0.6, 1.5)  # of the velocity; 1 is right
PROMPT_MARGIN = 1.05  # the error with the prompt, as a multiple of that without, averaged
SPREAD = 8  # how far the strength of a weight may be from the median of its kind
CONVROT_GROUPSIZES = (0, 16, 64, 256, 1024)
AFTER_SCALE = ("sign", "amplitude", "time", "naming", "convrot", "prompt", "denoising")
SCENE_PROMPT = "a large red ball and a small blue ball on a rough grey ground under a pale sky"


class Finding(NamedTuple):
    """One line of a report."""

    name: str
    ok: bool | None  # None where there was nothing to test
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "-   "}[self.ok]
        return f"{mark}  {self.name:<14} {self.detail}"


class Pass(NamedTuple):
    """What one pass predicted, against the truth."""

    error: float  # mean squared error of x0
    cosine: float  # between the velocity and the true one
    amplitude: float  # of the velocity along the true one

    @property
    def unexplained(self) -> float:
        """Share of the velocity that is wrong, whatever its sign and size."""
        return 1 - self.cosine**2


class Probe:
    """A model, an image and its noise."""

    def __init__(
        self, model: L2PTransformer, image: Tensor, prompt: Tensor, nothing: Tensor, seed: int = 0
    ):
        """image: (1, 3, H, W) in [-1, 1]. prompt, nothing: embeddings of its prompt and of the
        empty one."""
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        self.device = prompt.device
        self.model, self.prompt, self.nothing = model, prompt, nothing
        self.image, self.noise = image.to(self.device), noise.to(self.device)

    @torch.no_grad()
    def run(self, sigma: float, prompt: Tensor | None = None, time: float | None = None) -> Pass:
        """Run one pass. prompt: by default the image's. time: what the model is told; by default
        1 - sigma."""
        x = interpolate(self.image, self.noise, sigma)
        t = torch.tensor([1 - sigma if time is None else time], device=self.device)
        embeds = [self.prompt if prompt is None else prompt]
        velocity = -self.model(x, t, embeds).float()
        truth = self.noise - self.image
        along = (velocity * truth).sum()
        return Pass(
            F.mse_loss(x - sigma * velocity, self.image).item(),
            (along / (velocity.norm() * truth.norm())).item(),
            (along / (truth * truth).sum()).item(),
        )

    def baseline(self, sigma: float) -> float:
        """Return the squared error of the best x0 that needs no model."""
        x = interpolate(self.image, self.noise, sigma)
        side = min(x.shape[-2:])
        blurred = (blur(x, width) for width in BLURS if 3 * width < side)
        return min(F.mse_loss(scaled_to(each, self.image), self.image).item() for each in blurred)


def prove(probe: Probe) -> list[Finding]:
    """Return the findings about the weights and what they predict, one for each kind of fault.

    Once a fault is found, what it would drag along is not tested."""
    found = [check_strengths(probe.model)]
    if found[0].ok is False:
        return [*found, *untested(*AFTER_SCALE)]
    given = [probe.run(sigma) for sigma in SIGMAS]
    without = [probe.run(sigma, probe.nothing) for sigma in SIGMAS]
    found.append(check_sign(given))
    if found[-1].ok is False:
        return [*found, *untested("amplitude", "time", "naming", "convrot", "prompt", "denoising")]
    found.append(check_amplitude(given))
    if found[-1].ok is False:
        return [*found, *untested("time", "naming", "convrot", "prompt", "denoising")]
    found += check_readings(probe, given)
    if any(each.ok is False for each in found):
        return [*found, *untested("prompt", "denoising")]
    baselines = [probe.baseline(sigma) for sigma in SIGMAS]
    if without[-1].error <= MARGIN * baselines[-1]:  # what denoises without a prompt
        found.append(check_prompt(given, without))
        if found[-1].ok is False:
            return [*found, *untested("denoising")]
    return [*found, check_denoising(baselines, given, without)]


def untested(*names: str) -> list[Finding]:
    """Findings that wait for an earlier one."""
    return [Finding(name, None, "not tested: fix the fault above first") for name in names]


def check_strengths(model: L2PTransformer) -> Finding:
    """Compare the weights of each kind of linear, over all blocks: a wrong scale stands out."""
    kinds: dict[str, dict[str, float]] = {}
    references: dict[str, list[float]] = {}  # of the linears that are not quantized
    for name, module in model.named_modules():
        in_block = name.partition(".")[0] in model.config.depths
        if not isinstance(module, (nn.Linear, Int8Linear)) or not in_block:
            continue
        kind = name.split(".", 2)[2]
        strength = strength_of(module)
        kinds.setdefault(kind, {})[name] = strength
        if not isinstance(module, Int8Linear):
            references.setdefault(kind, []).append(strength)
    count = 0
    for kind, strengths in kinds.items():
        middle = float(np.median(references.get(kind) or list(strengths.values())))
        for name, strength in strengths.items():
            count += 1
            if not middle / SPREAD <= strength <= middle * SPREAD or strength == 0:
                times = strength / middle if middle else math.inf
                return Finding(
                    "scale",
                    False,
                    f"the weights of {name} are {times:.3g} times as large as those of the same"
                    f" linear in other blocks; expected 1/{SPREAD} to {SPREAD} times. Its"
                    " weight_scale is wrong, or its data are damaged: get the file again, or"
                    " quantize it again",
                )
    return Finding(
        "scale",
        True,
        f"the weight scales of {count} linears agree with other blocks within {SPREAD} x",
    )


def strength_of(module: nn.Module) -> float:
    """Return the root mean square of a linear's weight, times the root of its inputs."""
    weight = module.weight.detach()
    scale = module.weight_scale if isinstance(module, Int8Linear) else 1.0
    squares = (weight.float() * scale).square().mean()
    return math.sqrt(squares.item() * weight.shape[1])


def check_sign(given: list[Pass]) -> Finding:
    """A model that predicts noise - image, or the reverse in training, points backwards."""
    cosine = sum(each.cosine for each in given) / len(given)
    if cosine < -0.3:
        return Finding(
            "sign",
            False,
            f"the velocity has the opposite direction (cosine {cosine:.2f}); expected image - noise"
            " from the model. The checkpoint was trained with the opposite sign",
        )
    return Finding(
        "sign", True, f"the cosine between the velocity and the true one is {cosine:.2f}"
    )


def check_amplitude(given: list[Pass]) -> Finding:
    """The velocity has the right size where it points the right way."""
    amplitude = sum(each.amplitude for each in given) / len(given)
    told = f"the velocity is {amplitude:.2f} times as long as the true one"
    if min(each.cosine for each in given) < 0.7:
        return Finding("amplitude", None, f"{told}, but has another direction")
    low, high = AMPLITUDES
    if not low <= amplitude <= high:
        return Finding(
            "amplitude",
            False,
            f"{told}; expected {low} to {high}. Images have values in [-1, 1] here: the checkpoint"
            " was trained on another range",
        )
    return Finding("amplitude", True, told)


def check_readings(probe: Probe, given: list[Pass]) -> list[Finding]:
    """Run the model as if the file meant something else, and name the one reading that is clearly
    better than ours."""
    names = {"time": 0, "naming": 0, "convrot": 0}
    best: tuple[float, str, str] | None = None
    for kind, told, sigma, run in readings(probe):
        names[kind] += 1
        ours = given[SIGMAS.index(sigma)].unexplained
        share = run().unexplained / max(ours, 1e-9)
        if best is None or share < best[0]:
            best = share, kind, told
    assert best is not None  # time is always there
    share, faulty, told = best
    findings = []
    for kind, count in names.items():
        if kind == faulty and share < CLEARLY:
            detail = f"with {told}, only {share:.2f} of the error remains: the file means that"
            findings.append(Finding(kind, False, detail))
        elif count:
            plural = "s" * (count > 1)
            detail = f"{count} other interpretation{plural} of the file tried; none is better"
            findings.append(Finding(kind, True, detail))
        else:
            untold = "the file has no INT8 weights" if kind == "convrot" else "not tested on it"
            findings.append(Finding(kind, None, untold))
    return findings


def readings(probe: Probe) -> Iterator[tuple[str, str, float, Callable[[], Pass]]]:
    """Other readings of the file: (kind, in words, sigma, one pass)."""
    high, low = SIGMAS[0], SIGMAS[-1]
    yield "time", "timestep 1 for noise and 0 for image", high, partial(probe.run, high, time=high)
    if isinstance(probe.model, L2PTransformer):
        yield from misnamings(probe, low)
    layers = [each for each in probe.model.modules() if isinstance(each, Int8Linear)]
    present = {each.convrot_groupsize for each in layers}
    for size in CONVROT_GROUPSIZES if layers else ():
        if present != {size} and any(each.weight.shape[1] % max(size, 1) == 0 for each in layers):
            told = f"convrot {size}" if size else "no rotation"
            flag = f"{told} (give --convrot {size})" if size else told
            yield "convrot", flag, low, partial(_rotated, probe, low, layers, size)


def misnamings(probe: Probe, sigma: float) -> Iterator[tuple[str, str, float, Callable[[], Pass]]]:
    """`readings` of a Z-Image under which tensors of one shape changed places."""
    blocks = probe.model.blocks
    qkv = ("to_q", "to_k", "to_v")
    for order in list(permutations(qkv))[1:]:
        attentions = [block.attention for block in blocks]
        told = f"{', '.join(order)} in the places of {', '.join(qkv)}"
        yield "naming", told, sigma, partial(_swapped, probe, sigma, attentions, qkv, order)
    feeds = [block.feed_forward for block in blocks]
    gates, reverse = ("w1", "w3"), ("w3", "w1")
    told = "w1 and w3 swapped"
    yield "naming", told, sigma, partial(_swapped, probe, sigma, feeds, gates, reverse)


def _swapped(
    probe: Probe,
    sigma: float,
    modules: list[nn.Module],
    names: tuple[str, ...],
    order: tuple[str, ...],
) -> Pass:
    """One pass with these submodules in another order."""
    with reordered(modules, names, order):
        return probe.run(sigma)


@contextmanager
def reordered(
    modules: list[nn.Module], names: tuple[str, ...], order: tuple[str, ...]
) -> Iterator[None]:
    """Within it, each module's `names` hold what `order` held."""
    before = [[getattr(module, name) for name in names] for module in modules]
    for module in modules:
        for name, other in zip(names, [getattr(module, each) for each in order]):
            setattr(module, name, other)
    try:
        yield
    finally:
        for module, held in zip(modules, before):
            for name, each in zip(names, held):
                setattr(module, name, each)


def _rotated(probe: Probe, sigma: float, layers: list[Int8Linear], groupsize: int) -> Pass:
    """One pass with INT8 weights taken for rotated in groups of that size, where it divides
    them."""
    before = [layer.convrot_groupsize for layer in layers]
    for layer in layers:
        fits = groupsize and layer.weight.shape[1] % groupsize == 0
        layer.convrot_groupsize = groupsize if fits else 0
    try:
        return probe.run(sigma)
    finally:
        for layer, size in zip(layers, before):
            layer.convrot_groupsize = size


def check_denoising(baselines: list[float], given: list[Pass], without: list[Pass]) -> Finding:
    """The x0 prediction beats every baseline by `MARGIN`, with and without the prompt."""
    told, good = [], True
    for sigma, base, one, other in zip(SIGMAS, baselines, given, without):
        shares = one.error / base, other.error / base
        told.append(f"{shares[0]:.2f} at sigma {sigma}")
        # without its prompt, what was there at almost pure noise is anyone's guess
        good = good and shares[0] <= MARGIN and (sigma == SIGMAS[0] or shares[1] <= MARGIN)
    detail = f"error of the x0 prediction, relative to the best baseline: {', '.join(told)}"
    if not good:
        detail += f"; expected at most {MARGIN}. The weights do not denoise: get the file again"
    return Finding("denoising", good, detail)


def check_prompt(given: list[Pass], without: list[Pass]) -> Finding:
    """The prompt changes the prediction, and not for the worse."""
    ratios = [one.error / other.error for one, other in zip(given, without)]
    ratio = math.exp(sum(map(math.log, ratios)) / len(ratios))
    moved = max(abs(one.cosine - other.cosine) for one, other in zip(given, without))
    detail = f"the error with the prompt is {ratio:.2f} times that without"
    if moved < 1e-6:
        return Finding("prompt", False, "the prompt has no effect at all")
    if ratio > PROMPT_MARGIN:
        detail += (
            f"; expected at most {PROMPT_MARGIN}. The text encoder or its tokenizer is not the one"
            " that this checkpoint was trained with, or the prompt does not describe the image"
        )
    return Finding("prompt", ratio <= PROMPT_MARGIN, detail)


def scaled_to(x: Tensor, image: Tensor) -> Tensor:
    """Return x times the factor that brings it nearest to the image."""
    return x * ((x * image).sum() / (x * x).sum())


def blur(x: Tensor, width: float) -> Tensor:
    """Return (B, C, H, W) blurred by a Gaussian of that standard deviation, in pixels."""
    if not width:
        return x
    reach = int(3 * width)
    places = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-((places / width) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (reach, reach, reach, reach), mode="reflect")
    x = F.conv2d(x, kernel[..., None], groups=x.shape[1])
    return F.conv2d(x, kernel[:, :, None], groups=x.shape[1])


def draw_scene(height: int, width: int, seed: int = 0) -> Image.Image:
    """Draw the scene of `SCENE_PROMPT`: shaded balls before a sky and a ground, all with texture of
    a 1/f spectrum, as photographs have it (Field 1987, J. Opt. Soc. Am. A 4)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j][..., None]  # fmt: skip
    texture = pink_noise(height, width, rng)[..., None]
    ground = np.array((0.45, 0.43, 0.40)) * (0.7 + 0.5 * y) + 0.12 * texture
    sky = np.array((0.65, 0.75, 0.85)) * (1.1 - 0.4 * y) + 0.03 * texture
    pixels = np.where(y > 0.55, ground, sky)
    for (row, column, radius), colour in (
        ((0.55, 0.36, 0.26), (0.80, 0.12, 0.10)),
        ((0.72, 0.76, 0.13), (0.12, 0.22, 0.75)),
    ):
        across, down = (x - column) / radius, (y - row) / radius
        depth = np.sqrt(np.clip(1 - across**2 - down**2, 0, 1))
        light = np.clip(-0.5 * across - 0.6 * down + 0.62 * depth, 0, 1)
        shade = np.array(colour) * (0.2 + 0.8 * light) + 0.5 * light**20 + 0.02 * texture
        coverage = np.clip((1 - np.hypot(across, down)) * radius * height, 0, 1)
        pixels = pixels * (1 - coverage) + shade * coverage
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def pink_noise(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return (height, width) noise whose amplitude falls as 1/f, of mean 0 and deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
    noise = np.fft.irfft2(spectrum, (height, width))
    return noise / noise.std()
