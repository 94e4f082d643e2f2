"""Everything about speed and memory that only a card can say, in at most eight minutes.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --smoke          (every line of it on a CPU, with tiny sizes)

Weights of the published sizes are drawn on the card; nothing is downloaded. It takes 24 GB of the
card's memory for all but the training of larger cards, and 13 GB of disk for the load time; what
does not fit, or is not installed, is a line that says so. Prints one table, and writes the same as
JSON. Steps are guided: two evaluations. Please send the JSON to the project: nobody there has a
card."""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from comfyui_l2p.l2p_core import L2PConfig, L2PTransformer, load_model
from comfyui_l2p.l2p_core.attention import BACKENDS, attention_by, check_backend
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS
from comfyui_l2p.l2p_core.devices import default_device, empty_cache
from comfyui_l2p.l2p_core.files.fp8 import Fp8Linear
from comfyui_l2p.l2p_core.files.quantization import Int8Linear
from comfyui_l2p.l2p_core.flow import SOLVERS, flow_matching_loss, guided_velocity, schedule
from comfyui_l2p.l2p_core.meter import peak_bytes, peak_on, shapes_only
from comfyui_l2p.l2p_core.pipeline import stream_blocks
from comfyui_l2p.l2p_core.stages import in_windows
from comfyui_l2p.l2p_core.train.config import read_config
from comfyui_l2p.l2p_core.train.prepare import make_optimizer, prepare
from comfyui_l2p.l2p_core.train.presets import PRESETS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from golden import recipe  # noqa: E402

LIMIT = 480  # seconds
GOLDEN = ROOT / "tests" / "golden"
KINDS = {"layers": {}, "everything": {"freeze": ""}, "LoRA": {"lora_rank": 16}}


class Row(NamedTuple):
    """One line of the table."""

    what: str
    value: float | None
    unit: str
    note: str = ""


class Card:
    """The device, and the sizes that are run on it."""

    def __init__(self, smoke: bool, device: torch.device):
        self.smoke, self.device = smoke, device
        self.dtype = torch.float32 if smoke else torch.bfloat16  # slow on many CPUs
        self.size, self.steps, self.repeats = (64, 2, 1) if smoke else (1024, 30, 5)
        self.windowed = 2 * self.size
        self.eager = 0.0  # seconds of a step, once it is measured

    def config(self, patch: int = 16) -> L2PConfig:
        """The published one, or a tiny one of the same patch."""
        full = L2PConfig(patch_size=patch, decoder=PUBLISHED_DECODERS[patch])
        if not self.smoke:
            return full
        sizes = {"dim": 96, "n_heads": 3, "n_layers": 1, "n_refiner_layers": 1, "ffn_dim": 256}
        decoder = tuple(level._replace(enc=4, up=4, dec=4) for level in full.decoder)
        return replace(full, **sizes, cap_feat_dim=64, bottleneck_dim=32, decoder=decoder)

    def model(self, patch: int = 16, device: torch.device | None = None) -> L2PTransformer:
        """Random weights that keep numbers at their size."""
        with torch.device("meta"):
            model = L2PTransformer(self.config(patch)).to(self.dtype).requires_grad_(False)
        model.to_empty(device=device or self.device)
        for name, weight in model.named_parameters():
            inputs = weight[0].numel() if weight.dim() > 1 else 1
            weight.normal_(std=inputs**-0.5 if weight.dim() > 1 else 0.1)
            if "norm" in name or name == "cap_embedder.0.weight":
                weight.add_(1)
        return model.eval()

    def prompts(self, model: L2PTransformer, *lengths: int) -> list[Tensor]:
        """Random embeddings."""
        width = model.config.cap_feat_dim
        return [torch.randn(each, width, device=self.device, dtype=self.dtype) for each in lengths]

    def noise(self, size: int, batch: int = 1) -> Tensor:
        """Standard normal, float32."""
        return torch.randn(batch, 3, size, size, device=self.device)

    def synchronize(self) -> None:
        """Wait for the card."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def seconds(self, run: Callable[[], object], repeats: int | None = None) -> float:
        """The median after one run that does not count."""
        run()
        took = []
        for _ in range(repeats or self.repeats):
            self.synchronize()
            started = time.perf_counter()
            run()
            self.synchronize()
            took.append(time.perf_counter() - started)
        return statistics.median(took)


def guided_step(card: Card, model: L2PTransformer, size: int, **options) -> Callable[[], Tensor]:
    """One step at half of the way. options: of `guided_velocity`."""
    positive, negative = card.prompts(model, 100, 12)
    velocity, x = guided_velocity(model, [positive], [negative], 2.0, **options), card.noise(size)
    return lambda: velocity(x, 0.5)


def numerics(card: Card) -> Iterator[Row]:
    """The recorded numbers of the published program (tests/golden/README.md), on this device."""
    shapes = recipe.shapes(recipe.TINY)
    weights = recipe.torch_weights(recipe.TINY)
    case = "64x128.cap40.t0.97"
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.015)):
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        recorded = {
            key: value.to(card.device)
            for key, value in load_file(GOLDEN / f"dit_{name}.safetensors").items()
        }
        model = L2PTransformer(L2PConfig.from_shapes(shapes)).to(card.device, dtype).eval()
        model.load_state_dict(weights)
        found = model(
            recorded["input.image.64x128"],
            recorded[f"case.{case}.t"],
            [recorded["input.caption.40"]],
        ).float()
        wanted = recorded[f"case.{case}.output"].float()
        apart = float((found - wanted).norm() / wanted.norm())
        verdict = "right" if apart < bound else "WRONG"
        yield Row(f"network in {name} against recorded numbers", apart, "relative", verdict)


def in_8_bits(weight: Tensor, kind: str) -> Int8Linear | Fp8Linear:
    """A linear layer's weight as INT8 or FP8, a scale for each row."""
    weight, largest = weight.float(), 127 if kind == "INT8" else 448
    scale = weight.abs().amax(1, keepdim=True) / largest
    if kind == "INT8":
        return Int8Linear((weight / scale).round().to(torch.int8), scale, None)
    return Fp8Linear((weight / scale).to(torch.float8_e4m3fn), scale, None)


def steps(card: Card) -> Iterator[Row]:
    """Guided steps of the 1K model, in every way that it can be run."""
    model = card.model()
    eager = card.seconds(guided_step(card, model, card.size))
    card.eager = eager
    yield Row("step, eager", eager, "s")
    batched = card.seconds(guided_step(card, model, card.size, batch_guidance=True))
    yield Row("step, both prompts in one batch", batched, "s", f"{batched / eager:.2f} of eager")

    count, peak = counted_peak(card), real_peak(card, guided_step(card, model, card.size))
    yield Row("peak memory of a step beside the weights", peak / 1e9, "GB", f"counted {count:.2f}")

    for name, sampler, number in (("euler", "euler", 30), ("ab2", "ab2", 18)):
        number = min(number, card.steps)
        velocity = guided_velocity(model, *([each] for each in card.prompts(model, 100, 12)), 2.0)
        started = time.perf_counter()
        SOLVERS[sampler](velocity, card.noise(card.size), schedule(number))
        card.synchronize()
        yield Row(f"image, {name} in {number} steps", time.perf_counter() - started, "s")

    velocity = guided_velocity(model, *([each] for each in card.prompts(model, 100, 12)), 2.0)
    tiled = in_windows(velocity, card.size, model.config.size_multiple)
    x = card.noise(card.windowed)
    took = card.seconds(lambda: tiled(x, 0.5), 1)
    yield Row(f"step at {card.windowed} in windows of {card.size}", took, "s")

    for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
        block.compile(dynamic=True, backend="eager" if card.smoke else "inductor")
    step, started = guided_step(card, model, card.size), time.perf_counter()
    step()
    card.synchronize()
    first = time.perf_counter() - started
    compiled = card.seconds(step)
    gain = eager - compiled
    after = f"pays after {first / gain:.0f} steps" if gain > 0 else "never pays"
    yield Row("step, compiled", compiled, "s", f"{compiled / eager:.2f} of eager, {after}")
    yield Row("compiling", first, "s")


def steps_in_8_bits(card: Card) -> Iterator[Row]:
    """The same with the main layers' products in 8 bits."""
    for kind in ("INT8", "FP8"):

        def run(kind: str = kind) -> list[Row]:
            model = card.model()
            for name, layer in list(model.layers.named_modules()):
                if isinstance(layer, nn.Linear) and "adaLN" not in name:
                    model.layers.set_submodule(name, in_8_bits(layer.weight, kind))
            took = card.seconds(guided_step(card, model, card.size))
            note = f"{took / card.eager:.2f} of eager" if card.eager else ""
            return [Row(f"step, main layers in {kind}", took, "s", note)]

        yield from attempt(run, f"step, main layers in {kind}")
        empty_cache(card.device)


def counted_peak(card: Card) -> float:
    """GB that a guided step holds beside the weights, counted on shapes."""
    with torch.device("meta"):
        model = L2PTransformer(card.config()).to(card.dtype).requires_grad_(False)
    width = card.config().cap_feat_dim
    with shapes_only(model):
        positive, negative = (torch.empty(each, width, dtype=card.dtype) for each in (100, 12))
        velocity = guided_velocity(model, [positive], [negative], 2.0)
        x = torch.empty(1, 3, card.size, card.size)
        return peak_bytes(lambda: velocity(x, 0.5))[0] / 1e9


def real_peak(card: Card, run: Callable[[], Tensor]) -> float:
    """Bytes that were allocated at the peak, beside those before."""
    empty_cache(card.device)
    return peak_on(card.device, run)


def products(card: Card) -> Iterator[Row]:
    """One product of the feed-forward, in the dtypes that a card may have."""
    tokens, inputs, outputs = (32, 64, 96) if card.smoke else (4224, 3840, 10240)
    x = torch.randn(tokens, inputs, device=card.device, dtype=card.dtype)
    weight = torch.randn(outputs, inputs, device=card.device, dtype=card.dtype)
    whole = card.seconds(lambda: x @ weight.t())
    yield Row("product, bfloat16", 2e-12 * tokens * inputs * outputs / whole, "TFLOP/s")

    for kind in ("FP8", "INT8"):

        def run(kind: str = kind) -> list[Row]:
            eight_bits = in_8_bits(weight, kind)
            took = card.seconds(lambda: eight_bits(x))
            return [Row(f"product, {kind}", took / whole, "of bfloat16's time")]

        yield from attempt(run, f"product, {kind}")


def attention(card: Card) -> Iterator[Row]:
    """Attention of a step by each value of --attention, and the step with it."""
    tokens, heads = (64, 3) if card.smoke else (4224, 30)
    q, k, v = (
        torch.randn(1, heads, tokens, 128, device=card.device, dtype=card.dtype) for _ in "qkv"
    )
    flops = 4 * heads * tokens**2 * 128
    model = card.model()
    for backend in BACKENDS:

        def run(backend: str = backend) -> list[Row]:
            check_backend(backend, card.device, card.dtype, model.config.head_dim)
            attend = attention_by(backend)
            alone = card.seconds(lambda: attend(q, k, v))
            step = card.seconds(guided_step(card, model, card.size, attention=backend))
            return [
                Row(f"attention, {backend}", 1e-12 * flops / alone, "TFLOP/s"),
                Row(f"step, attention {backend}", step, "s"),
            ]

        yield from attempt(run, f"attention, {backend}")


def at_4096(card: Card) -> Iterator[Row]:
    """A guided step of the 4K model."""
    size = 4 * card.size
    took = card.seconds(guided_step(card, card.model(64), size), 1 if card.smoke else 3)
    yield Row(f"step of the 4K model at {size}", took, "s")


def offload(card: Card) -> Iterator[Row]:
    """A step with weights that stay in the CPU's memory, against the copies alone."""
    model = card.model(device=torch.device("cpu"))
    size = sum(weight.nbytes for weight in model.layers.parameters())
    layer = [weight.pin_memory() if card.device.type == "cuda" else weight for weight in
             model.layers[0].parameters()]  # fmt: skip
    copy = card.seconds(lambda: [each.to(card.device, copy=True) for each in layer])
    stream_blocks(model, card.device)
    took = card.seconds(guided_step(card, model, card.size), 1)
    copies = 2 * copy * len(model.layers)
    note = f"{copies:.3g} s of it are copies of {2 * size / 1e9:.3g} GB, if nothing overlapped"
    yield Row("step, offloaded", took, "s", note)


def loading(card: Card) -> Iterator[Row]:
    """A checkpoint of the real size, from the system's cache."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        weights = card.model().state_dict()
        save_file({name: weight.cpu().contiguous() for name, weight in weights.items()}, file)
        del weights
        empty_cache(card.device)
        started = time.perf_counter()
        load_model(file, card.device, card.dtype)
        card.synchronize()
        took = time.perf_counter() - started
        yield Row("loading", took, "s", f"{file.stat().st_size / took / 1e9:.2f} GB/s")


def training(card: Card) -> Iterator[Row]:
    """A training step of each preset of `l2p train --memory`, one image."""
    for kind, cards in PRESETS.items():
        for memory in cards:
            what = f"training step, {kind}, {memory}"
            yield from attempt(partial(training_step, card, what, kind, memory), what)
            empty_cache(card.device)


def training_step(card: Card, what: str, kind: str, memory: str) -> list[Row]:
    """Its seconds, and the memory that all of it took."""
    given = {"checkpoint": "none", "data": "none", "output": "none", "memory": memory}
    config = read_config(None, {**given, **KINDS[kind]})
    took = 0.0

    def run() -> None:
        nonlocal took
        model = card.model()
        trained = prepare(model.requires_grad_(True), config, card.device)
        optimizer = make_optimizer(trained, config, str(card.device))
        prompt, sigma = card.prompts(model, 100), torch.tensor([0.5], device=card.device)
        image, noise = card.noise(card.size), card.noise(card.size)

        @torch.enable_grad()
        def step() -> Tensor:
            with torch.autocast(card.device.type, torch.bfloat16, enabled=not card.smoke):
                loss = flow_matching_loss(model, image, prompt, noise, sigma)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        took = card.seconds(step, 1 if card.smoke else 3)

    peak = peak_on(card.device, run)
    return [Row(what, took, "s", f"{peak / 1e9:.1f} GB at the peak")]


SECTIONS = (
    numerics,
    steps,
    steps_in_8_bits,
    products,
    attention,
    at_4096,
    offload,
    loading,
    training,
)


def attempt(run: Callable[[], Iterable[Row]], what: str, strict: bool = False) -> Iterator[Row]:
    """The rows, or one that says why there are none."""
    try:
        yield from run()
    except (ImportError, RuntimeError, ValueError) as error:
        if strict:
            raise
        reason = str(error).strip() or type(error).__name__
        yield Row(what, None, "", f"not here: {reason.splitlines()[0][:80]}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--device", help="default: the accelerator; cpu takes --only products")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[each.__name__ for each in SECTIONS],
        default=[each.__name__ for each in SECTIONS],
        help="default: all",
    )
    args = parser.parse_args()
    device = torch.device(args.device) if args.device else default_device()
    if device.type == "cpu" and not (args.smoke or args.device):
        parser.error("torch finds no accelerator here; --smoke runs everything small on the CPU")
    card = Card(args.smoke, torch.device("cpu") if args.smoke else device)
    name = torch.cuda.get_device_name() if card.device.type == "cuda" else str(card.device)
    print(f"{name}, torch {torch.__version__}\n| | | | |\n|---|---|---|---|", flush=True)
    started, rows = time.monotonic(), []
    for section in SECTIONS:
        if section.__name__ not in args.only:
            continue
        if time.monotonic() - started > LIMIT:
            found = [Row(section.__name__, None, "", f"left out after {LIMIT} s")]
        else:
            found = attempt(partial(section, card), section.__name__, args.smoke)
        for row in found:
            rows.append(row)
            value = "" if row.value is None else f"{row.value:.4g}"
            print(f"| {row.what} | {value} | {row.unit} | {row.note} |", flush=True)
        empty_cache(card.device)
    if args.json:
        table = {"device": name, "torch": torch.__version__, "smoke": args.smoke}
        args.json.write_text(
            json.dumps({**table, "rows": [row._asdict() for row in rows]}, indent=1)
        )


if __name__ == "__main__":
    main()
