"""What lets a large model train on a small card: frozen linears in 8 or 4 bits, and AdamW one
tensor at a time."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .config import TrainConfig

NF4_BLOCK = 64  # weights that share a scale


def bitsandbytes() -> ModuleType:
    """The bitsandbytes module. Raises ImportError with the command that installs it."""
    try:
        import bitsandbytes
    except ImportError:
        raise ImportError(
            "8-bit AdamW and NF4 need bitsandbytes: pip install 'comfyui-l2p[low-memory]'"
        ) from None
    return bitsandbytes


class FrozenLinear(nn.Linear):
    """A linear without bias that is not trained: its weight lies in INT8 with a scale for each row,
    or in NF4 with one for every 64 numbers (QLoRA, arXiv 2305.14314), and is unpacked for as long
    as it is multiplied with, on the way back once more."""

    def __init__(self, linear: nn.Linear, kind: str):
        """kind: int8 or nf4."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            None,
        )
        self.kind, weight = kind, linear.weight.detach()
        if kind == "nf4":
            bitsandbytes()
            packed, scale = torch.ops.bitsandbytes.quantize_4bit(
                weight.contiguous(), NF4_BLOCK, kind, torch.uint8
            )
        else:
            scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            packed = (weight / scale).round().to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("scale", scale)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """(out_features, in_features)."""
        if self.kind == "nf4":
            shape = [self.out_features, self.in_features]
            return torch.ops.bitsandbytes.dequantize_4bit(
                self.weight, self.scale, NF4_BLOCK, self.kind, shape, dtype
            )
        return self.weight.to(dtype) * self.scale.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N)."""
        return _Multiply.apply(x, self.unpacked)


class _Multiply(torch.autograd.Function):
    """x W^T, keeping neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpacked: Callable[[torch.dtype], Tensor]) -> Tensor:
        """(..., K) → (..., N)."""
        ctx.unpacked = unpacked
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return x.to(dtype) @ unpacked(dtype).T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.unpacked(gradient.dtype), None


def quantize_frozen(module: nn.Module, kind: str, device: torch.device | None = None) -> None:
    """Put a `FrozenLinear` in the place of each linear in a frozen module that has no bias, made on
    `device` where one is given."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear) and child.bias is None:
            setattr(module, name, FrozenLinear(child.to(device) if device else child, kind))
        else:
            quantize_frozen(child, kind, device)


def round_stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 → bfloat16, up or down at random, the nearer the likelier: the mean stays, so that
    steps far smaller than a bfloat16 can tell apart add up (arXiv 2010.06192)."""
    bits = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    bits += x.contiguous().view(torch.int32)
    bits &= -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)


class FrugalAdamW(torch.optim.Optimizer):
    """AdamW, one tensor at a time, over a float32 copy that is there only meanwhile. By the
    configuration:

    optimizer = "adamw8bit": its state in 8 bits, by bitsandbytes; offload_state: state and
    arithmetic on the CPU; stochastic_rounding: bfloat16 weights are rounded so; step_in_backward:
    each tensor is updated as soon as its gradient is there, and the gradient forgotten, `norm`
    telling how long all of them were."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: TrainConfig,
        host: str = "cpu",
        **settings: object,
    ):
        """host: where `offload_state` takes things to. settings: AdamW's own."""
        super().__init__(list(parameters), settings)
        kind = (
            bitsandbytes().optim.AdamW8bit if config.optimizer == "adamw8bit" else torch.optim.AdamW
        )
        self.seed, self.steps = config.seed, 0
        self.home = torch.device(host) if config.offload_state else None
        self.squares: list[Tensor] = []
        self.each = {
            parameter: kind([nn.Parameter(self.empty(parameter))], **settings)
            for parameter in self.parameters()
        }
        for parameter in self.parameters() if config.step_in_backward else ():
            parameter.register_post_accumulate_grad_hook(self.update)

    def parameters(self) -> list[nn.Parameter]:
        """All trained parameters."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def empty(self, parameter: nn.Parameter) -> Tensor:
        """Where a parameter's state will be."""
        return torch.empty(0, dtype=torch.float32, device=self.home or parameter.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update what has a gradient, and begin the next step."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                self.update(parameter)
        self.steps += 1
        self.squares.clear()

    def norm(self) -> float:
        """Length of all gradients of this step together."""
        return float(torch.stack(self.squares).sum().sqrt()) if self.squares else 0.0

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """One step of one tensor; its gradient is gone afterwards."""
        inner = self.each[parameter]
        inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        (copy,) = inner.param_groups[0]["params"]
        copy.data = parameter.data.to(self.home or parameter.device, torch.float32)
        copy.grad = parameter.grad.to(copy.device, torch.float32)
        self.squares.append(copy.grad.square().sum())
        parameter.grad = None
        inner.step()
        copy.grad = None
        if parameter.dtype == torch.bfloat16:
            seed = hash((self.seed, self.steps, len(self.squares))) % 2**63
            copy.data = round_stochastically(
                copy.data, None if copy.is_meta else torch.Generator(copy.device).manual_seed(seed)
            )
        parameter.data.copy_(copy.data)
        copy.data = self.empty(parameter)

    def state_dict(self) -> dict:
        """Steps done, and the state of each parameter's optimizer."""
        return {"steps": self.steps, "each": [inner.state_dict() for inner in self.each.values()]}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a saved state."""
        self.steps = state["steps"]
        for inner, each in zip(self.each.values(), state["each"], strict=True):
            own = tree_map(
                lambda value: value.clone() if isinstance(value, Tensor) else value, each
            )  # not the mapped file's
            inner.load_state_dict(own)
