"""What a guided step of the published sizes computes: operations, bytes moved and kernel launches,
by part, counted on tensors that have only a shape.

    python benchmarks/count.py
    python benchmarks/count.py --patch 64 --size 4096

A launch is an operation that touches memory; views are none. Its bytes are those of its inputs and
outputs, each once. Attention and RMSNorm count as one launch each, as torch's CUDA kernels are
since 2.8, whatever they are made of on the device that counts. The programs compute the same step
with the same widths: a pass with a prompt and one with the negative prompt. diffusers' is the
latent transformer at patches of 16 pixels, without a decoder."""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from comfyui_l2p.l2p_core import L2PConfig, L2PTransformer
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS
from comfyui_l2p.l2p_core.flow import guided_velocity
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PROMPT, NEGATIVE_PROMPT = 100, 12  # tokens
# Modules by the first part of their name, ours and ComfyUI's.
PARTS = {
    "layers": "main layers",
    "noise_refiner": "noise refiner",
    "context_refiner": "context refiner",
    "local_decoder": "decoder",
}
KINDS = ("matmul", "attention", "convolution", "element-wise")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_int_mm", "_scaled_mm")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


@dataclass
class Work:
    """What some operations take."""

    launches: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.launches + other.launches, self.flops + other.flops, self.bytes + other.bytes
        )


class Counter(TorchDispatchMode):
    """Adds up the work of every operation, by part of the model, kind and name."""

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device = device  # operations elsewhere, such as on the CPU beside it, are not counted
        self.by: dict[tuple[str, str, str], Work] = defaultdict(Work)
        self.part = "embedders and solver"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._overloadpacket.__name__
        given, made = tensors((args, kwargs)), tensors(result)
        storages = {each.untyped_storage()._cdata for each in given}
        view = not function._schema.is_mutable and any(
            each.untyped_storage()._cdata in storages for each in made
        )
        if not view and name not in ALLOCATIONS and name != "_unsafe_view":
            count = flop_registry.get(function._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            kind = (
                "matmul"
                if name in PRODUCTS
                else "convolution"
                if name == "convolution"
                else "element-wise"
            )
            self.add(kind, name, flops, given, made)
        return result

    def add(
        self, kind: str, name: str, flops: int, given: list[Tensor], made: list[Tensor]
    ) -> None:
        """Add one launch."""
        if any(each.device.type == self.device for each in made):
            size = sum(map(stored_bytes, [*given, *made]))
            self.by[self.part, kind, name] += Work(1, flops, size)

    def total(self, part: str | None = None, kind: str | None = None) -> Work:
        """The sum of a part, a kind, or all."""
        chosen = (
            work for (a, b, _), work in self.by.items() if part in (None, a) and kind in (None, b)
        )
        return sum(chosen, Work())

    def parts(self) -> list[str]:
        """The parts that did anything, the largest first."""
        found = {part for part, _, _ in self.by}
        return sorted(found, key=lambda part: -self.total(part).flops)


class AsOneKernel(TorchFunctionMode):
    """Counts attention and RMSNorm as the one kernel that they are on CUDA."""

    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args)) | kwargs
            query, key, value = (named[name] for name in ("query", "key", "value"))
            batch, heads, tokens, width = query.shape
            made = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
            flops = 2 * batch * heads * tokens * key.shape[2] * (width + value.shape[-1])
            given = tensors((args, kwargs))
            self.counter.add("attention", "scaled_dot_product_attention", flops, given, [made])
            return made
        if function is F.rms_norm:
            made = torch.empty_like(args[0])
            self.counter.add("element-wise", "rms_norm", 0, tensors((args, kwargs)), [made])
            return made
        return function(*args, **kwargs)


def tensors(values: object) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


def stored_bytes(tensor: Tensor) -> int:
    """Bytes that lie in memory: what is expanded lies there once."""
    numbers = tensor.itemsize
    for length, stride in zip(tensor.shape, tensor.stride()):
        numbers *= length if stride or not length else 1
    return numbers


@contextmanager
def counting(*models: nn.Module, device: str = "meta") -> Iterator[Counter]:
    """Within it, count all that is computed on the device, by part of the models."""
    counter, outside, handles = Counter(device), [], []

    def enter(part: str) -> None:
        outside.append(counter.part)
        counter.part = part

    def leave() -> None:
        counter.part = outside.pop()

    for model in models:
        for name, part in PARTS.items():
            stack = getattr(model, name, None)
            for module in stack if isinstance(stack, nn.ModuleList) else [stack]:
                if module is not None:
                    handles += [
                        module.register_forward_pre_hook(lambda *_, part=part: enter(part)),
                        module.register_forward_hook(lambda *_: leave()),
                    ]
    try:
        with torch.no_grad(), AsOneKernel(counter), counter:
            yield counter
    finally:
        for handle in handles:
            handle.remove()


def published_config(patch: int) -> L2PConfig:
    return L2PConfig(patch_size=patch, decoder=PUBLISHED_DECODERS[patch])


def build(config: L2PConfig) -> L2PTransformer:
    with torch.device("meta"):
        return L2PTransformer(config).bfloat16().requires_grad_(False)


def prompt_of(config: L2PConfig, tokens: int) -> Tensor:
    return torch.empty(tokens, config.cap_feat_dim, dtype=torch.bfloat16, device="meta")


def ours(
    config: L2PConfig,
    size: int,
    prompts: tuple[int, int],
    scale: float = 2.0,
    fused: bool = True,
    **options,
) -> Counter:
    """A step of this project's sampler, guided unless scale is 1. fused: with comfy-kitchen's
    kernel, as on a GPU that it supports. options: of `guided_velocity`."""
    model = build(config)
    positive, negative = (prompt_of(config, length) for length in prompts)
    image = torch.empty(1, 3, size, size, device="meta")
    with counting(model) as counter, fused_rotation(counter) if fused else nullcontext():
        velocity = guided_velocity(model, [positive], [negative], scale, **options)
        velocity(image, 0.5)
    return counter


def diffusers_backbone(config: L2PConfig, size: int, prompts: tuple[int, int]) -> Counter:
    """Two passes of diffusers' transformer with as many tokens and the same widths."""
    from diffusers import ZImageTransformer2DModel

    patch_size = config.patch_size
    with torch.device("meta"):
        model = ZImageTransformer2DModel(all_patch_size=(patch_size,), in_channels=3).bfloat16()
    model.requires_grad_(False)
    # its tables, made on the CPU at the first pass, are indexed by positions that have no numbers
    model.rope_embedder = Rotations(config.head_dim)
    image = torch.empty(3, 1, size, size, dtype=torch.bfloat16, device="meta")
    with counting(model) as counter:
        for length in prompts:
            time = torch.empty(1, device="meta")
            model([image], time, [prompt_of(config, length)], patch_size=patch_size)
    return counter


class Rotations(nn.Module):
    """Stands in for diffusers' table of rotations: the same result, looked up axis by axis."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.pairs = head_dim // 2

    def forward(self, ids: Tensor) -> Tensor:
        """(S, 3) positions → (S, head/2) rotations."""
        shape = (len(ids), self.pairs)
        return torch.empty(shape, dtype=torch.complex64, device=ids.device)


@contextmanager
def fused_rotation(counter: Counter) -> Iterator[None]:
    """Within it, count what comfy-kitchen's kernel does on a GPU: queries and keys are normalized
    and rotated at once."""

    def rms_rope(
        q: Tensor, k: Tensor, matrices: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        made = torch.empty_like(q), torch.empty_like(k)
        given = [q, k, matrices, q_weight, k_weight]
        counter.add("element-wise", "rms_rope", 0, given, list(made))
        return made

    with patch("comfyui_l2p.l2p_core.model.fused_rotation", lambda x: rms_rope):
        yield


PROGRAMS: dict[str, Callable[..., Counter]] = {
    "ours": ours,
    "ours without comfy-kitchen": partial(ours, fused=False),
    "ours, batched guidance": partial(ours, batch_guidance=True),
    "diffusers' transformer": diffusers_backbone,
}


def row(name: str, work: Work) -> str:
    return f"| {name} | {work.launches} | {work.flops / 1e12:.2f} | {work.bytes / 1e9:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patch", type=int, choices=PUBLISHED_DECODERS, default=16)
    parser.add_argument("--size", type=int, default=1024, help="side in pixels")
    parser.add_argument(
        "--prompts",
        type=int,
        nargs=2,
        default=(PROMPT, NEGATIVE_PROMPT),
        metavar="TOKENS",
        help="length of the prompt and of the negative prompt",
    )
    args = parser.parse_args()
    config = published_config(args.patch)
    print(
        f"A guided step, patch {args.patch}, {args.size} pixels, prompts of"
        f" {args.prompts[0]} and {args.prompts[1]} tokens\n"
        "| | launches | TFLOP | GB moved |\n|---|---|---|---|"
    )
    counted = {}
    for name, count in PROGRAMS.items():
        counted[name] = count(config, args.size, tuple(args.prompts))
        print(row(name, counted[name].total()), flush=True)
    print("\nOurs by part and kind\n| | launches | TFLOP | GB moved |\n|---|---|---|---|")
    mine = counted["ours"]
    for part in mine.parts():
        print(row(part, mine.total(part)))
        for kind in KINDS:
            if (work := mine.total(part, kind)).launches:
                print(row(f"- {kind}", work))
    print("\nElement-wise operations of the main layers")
    print("| operation | launches | GB moved |\n|---|---|---|")
    rows = [
        (work.bytes, name, work.launches)
        for (part, kind, name), work in mine.by.items()
        if (part, kind) == ("main layers", "element-wise")
    ]
    for size, name, launches in sorted(rows, reverse=True):
        print(f"| {name} | {launches} | {size / 1e9:.2f} |")


if __name__ == "__main__":
    main()
