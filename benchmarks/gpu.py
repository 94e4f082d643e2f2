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
import torch.distributed as dist
from comfyui_l2p.l2p_core import L2PConfig, L2PTransformer, load_model
from comfyui_l2p.l2p_core.attention import BACKENDS, attention_by, check_backend
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS
from comfyui_l2p.l2p_core.devices import default_device, empty_cache, memory_counter
from comfyui_l2p.l2p_core.files.fp8 import Fp8Linear
from comfyui_l2p.l2p_core.files.quantization import Int8Linear
from comfyui_l2p.l2p_core.flow import SOLVERS, flow_matching_loss, guided_velocity, schedule
from comfyui_l2p.l2p_core.meter import peak_bytes, peak_on, shapes_only
from comfyui_l2p.l2p_core.pipeline import stream_blocks
from comfyui_l2p.l2p_core.stages import in_windows
from comfyui_l2p.l2p_core.train.config import TrainConfig, read_config
from comfyui_l2p.l2p_core.train.launch import exact_float32, reset_peak
from comfyui_l2p.l2p_core.train.low_memory import FrozenLinear
from comfyui_l2p.l2p_core.train.prepare import make_optimizer, prepare
from comfyui_l2p.l2p_core.train.presets import PRESETS
from comfyui_l2p.l2p_core.train.shard import shard
from comfyui_l2p.l2p_core.train.transfer import to_host
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing, nn

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

    def model(
        self, patch: int = 16, device: torch.device | None = None, layers: int = 30
    ) -> L2PTransformer:
        """Random weights that keep numbers at their size. layers: at most."""
        config = self.config(patch)
        config = replace(config, n_layers=min(layers, config.n_layers))
        with torch.device("meta"):
            model = L2PTransformer(config).to(self.dtype).requires_grad_(False)
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

    x_32, weight_32 = x.float(), weight.float()
    took = card.seconds(lambda: x_32 @ weight_32.t())
    yield Row("product, float32", took / whole, "of bfloat16's time")

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


def faults(card: Card) -> Iterator[Row]:
    """What training once did wrong on a card or on two: a line for each fault.

    Faults of settings and launchers need no card; they are tests (tests/test_train_devices.py)."""
    for fault in (
        waits_of_8_bit_adamw,
        offloaded_state,
        copies_to_the_cpu,
        exact_convolution,
        gain_of_int8_rows,
        peak_since_reset,
        split_step,
    ):
        yield from attempt(partial(fault, card), fault.__name__.replace("_", " "))
        empty_cache(card.device)


def matrices(card: Card) -> dict[str, nn.Parameter]:
    """Eight matrices to train, as attention has them."""
    side = 64 if card.smoke else 3840
    weights = torch.randn(8, side, side, device=card.device)
    return {str(number): nn.Parameter(weight) for number, weight in enumerate(weights)}


def stepped(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A step with each weight as its own gradient."""

    def step() -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = weight.detach().clone()
        optimizer.step()

    return step


def waits(run: Callable[[], object]) -> int:
    """How often the CPU waits for the card in the second of two runs, by torch's profiler, which
    waits itself at its end."""

    def count(run: Callable[[], object]) -> int:
        with torch.profiler.profile() as profiler:
            run()
        events = profiler.key_averages()
        return sum(event.count for event in events if event.key.endswith("Synchronize"))

    run()
    return count(run) - count(lambda: None)


def waits_of_8_bit_adamw(card: Card) -> list[Row]:
    """bitsandbytes' own step waits after each tensor."""
    trained = matrices(card)
    found = waits(stepped(make_optimizer(trained, config_of(optimizer="adamw8bit"))))
    what = "waits for the card in a step of 8-bit AdamW"
    return [Row(what, found, "", f"{len(trained)} tensors")]


def offloaded_state(card: Card) -> list[Row]:
    """One kernel a tensor, and copies while it runs; AdamW unfused goes through memory a dozen
    times."""
    trained = matrices(card)
    there = [nn.Parameter(weight.detach().cpu().clone()) for weight in trained.values()]
    took = card.seconds(stepped(make_optimizer(trained, config_of(offload_state=True))))
    unfused = card.seconds(stepped(torch.optim.AdamW(there, foreach=False)))
    note = f"{took / unfused:.2f} of AdamW unfused on the CPU, without copies"
    return [Row("optimizer step, state on the CPU", took, "s", note)]


def copies_to_the_cpu(card: Card) -> list[Row]:
    """They are queued, which takes pinned memory."""
    tensor = torch.randn(1 << (10 if card.smoke else 27), device=card.device)
    queued = tensor.nbytes / card.seconds(lambda: to_host(tensor)) / 1e9
    plain = tensor.nbytes / card.seconds(lambda: tensor.to("cpu", copy=True)) / 1e9
    note = f"{waits(lambda: to_host(tensor))} waits; {plain:.3g} GB/s to pageable memory"
    return [Row("copy to the CPU", queued, "GB/s", note)]


def exact_convolution(card: Card) -> list[Row]:
    """By default a card's convolutions compute float32 in TF32, with 10 bits of mantissa."""
    side = 16 if card.smoke else 256
    x = torch.randn(1, 64, side, side, device=card.device)
    weight = torch.randn(64, 64, 3, 3, device=card.device)
    exact = nn.functional.conv2d(x.double(), weight.double())

    def error() -> float:
        return float((nn.functional.conv2d(x, weight) - exact).norm() / exact.norm())

    with exact_float32():
        found = error()
    return [
        Row("error of a convolution without TF32", found, "relative", f"{error():.2g} by default")
    ]


def gain_of_int8_rows(card: Card) -> list[Row]:
    """A row's scale in bfloat16 would be wrong by up to 4e-3, and the whole row with it."""
    linear = nn.Linear(256 if card.smoke else 3840, 256, bias=False, device=card.device)
    found, weight = FrozenLinear(linear, "int8").unpacked(torch.bfloat16).float(), linear.weight
    gain = (found * weight).sum(1) / weight.square().sum(1)
    note = "4e-3 with scales in bfloat16"
    return [Row("error of a row's length, frozen INT8", float((gain - 1).abs().max()), "", note)]


def peak_since_reset(card: Card) -> list[Row]:
    """Steps are told without the loading or the sampling before them."""
    counter = memory_counter(card.device)
    if counter is None:
        raise RuntimeError(f"torch counts no memory of {card.device}")
    before = counter.memory_allocated(card.device)
    torch.empty(1 << 30, device=card.device)
    note = f"{(counter.max_memory_allocated(card.device) - before) / 1e9:.2f} before the reset"
    reset_peak(card.device)
    found = (counter.max_memory_allocated(card.device) - before) / 1e9
    return [Row("peak of nothing after a tensor that is gone", found, "GB", note)]


# What processes that split the model gather weights in, and whether autocast keeps its copies.
SPLITS = {
    "as it is": (torch.bfloat16, False),
    "with copies in bfloat16 kept": (torch.bfloat16, True),
    "gathering float32": (None, False),
}


def split_step(card: Card) -> list[Row]:
    """A pass and its gradients under `--shard all`, on two cards."""
    if card.device.type == "cuda" and torch.cuda.device_count() < 2:
        raise RuntimeError("it takes two cards, and here is one")
    with tempfile.TemporaryDirectory() as folder:
        ended = multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException
        try:
            multiprocessing.spawn(split_process, (card.smoke, Path(folder)), nprocs=2)
        except ended as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from None
        found = json.loads(Path(folder, "found.json").read_text())
    seconds, peaks = ({name: pair[place] for name, pair in found.items()} for place in (0, 1))
    told = [
        ", ".join(f"{value:.3g} {name}" for name, value in each.items() if name != "as it is")
        for each in (seconds, peaks)
    ]
    return [
        Row("training step split over two cards", seconds["as it is"], "s", told[0]),
        Row("its peak on a card, beside its part of the model", peaks["as it is"], "GB", told[1]),
    ]


def split_process(rank: int, smoke: bool, folder: Path) -> None:
    """One of the two processes; the first writes what each of SPLITS takes."""
    card = Card(smoke, torch.device("cpu") if smoke else torch.device("cuda", rank))
    if not smoke:
        torch.cuda.set_device(rank)
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo" if smoke else "nccl", store, rank=rank, world_size=2)
    found = {}
    for name, (dtype, cache) in SPLITS.items():
        model = card.model(layers=4).requires_grad_(True)
        prepare(model, config_of(freeze=""))
        shard(model, card.device, weights=True, dtype=dtype)
        step = training_pass(card, model, cache)
        found[name] = card.seconds(step), peak_on(card.device, step) / 1e9
        del model, step
        empty_cache(card.device)
    dist.destroy_process_group()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))


def training(card: Card) -> Iterator[Row]:
    """A training step of each preset of `l2p train --memory`, one image."""
    for kind, cards in PRESETS.items():
        for memory in cards:
            what = f"training step, {kind}, {memory}"
            yield from attempt(partial(training_step, card, what, kind, memory), what)
            empty_cache(card.device)


def training_step(card: Card, what: str, kind: str, memory: str) -> list[Row]:
    """Its seconds, and the memory that all of it took."""
    config = config_of(memory=memory, **KINDS[kind])
    took = 0.0

    def run() -> None:
        nonlocal took
        model = card.model()
        trained = prepare(model.requires_grad_(True), config, card.device)
        optimizer = make_optimizer(trained, config, str(card.device))
        learn = training_pass(card, model)

        def step() -> None:
            learn()
            optimizer.step()
            optimizer.zero_grad()

        took = card.seconds(step, 1 if card.smoke else 3)

    peak = peak_on(card.device, run)
    return [Row(what, took, "s", f"{peak / 1e9:.1f} GB at the peak")]


def training_pass(card: Card, model: L2PTransformer, cache: bool = False) -> Callable[[], Tensor]:
    """The loss of one image and its gradients, which are gone at the next. cache: of autocast."""
    prompt, sigma = card.prompts(model, 100), torch.tensor([0.5], device=card.device)
    image, noise = card.noise(card.size), card.noise(card.size)

    @torch.enable_grad()
    def run() -> Tensor:
        model.zero_grad()
        with torch.autocast(card.device.type, torch.bfloat16, cache_enabled=cache):
            loss = flow_matching_loss(model, image, prompt, noise, sigma)
        loss.backward()
        return loss.detach()

    return run


def config_of(**settings: object) -> TrainConfig:
    """The settings of a run without files."""
    return read_config(None, {"checkpoint": "none", "data": "none", "output": "none", **settings})


SECTIONS = (
    numerics,
    steps,
    steps_in_8_bits,
    products,
    attention,
    at_4096,
    offload,
    loading,
    faults,
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
