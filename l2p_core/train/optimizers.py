"""Optimizers that update one tensor at a time, so that little has to be in memory at once."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .config import TrainConfig
from .low_memory import bitsandbytes, round_stochastically
from .transfer import arrived, to_device, to_host


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
        on_gpu: bool = False,
        **settings: object,
    ):
        """host: where `offload_state` takes things to. on_gpu: use a GPU's kernels. settings:
        AdamW's own."""
        super().__init__(list(parameters), settings)
        self.seed, self.steps = config.seed, 0
        # Unfused, AdamW goes through memory a dozen times, and holds a copy of the tensor.
        self.fused = on_gpu if not config.offload_state else host == "cpu"
        self.home = torch.device(host) if config.offload_state else None
        self.squares: list[Tensor] = []
        # What is on its way to the CPU: one tensor, while the one before is computed.
        self.coming: list[Callable[[], None]] = []
        self.each = {
            parameter: self.inner(parameter, config, settings) for parameter in self.parameters()
        }
        for parameter in self.parameters() if config.step_in_backward else ():
            parameter.register_post_accumulate_grad_hook(self.update)

    def inner(
        self, parameter: nn.Parameter, config: TrainConfig, settings: dict[str, Any]
    ) -> torch.optim.Optimizer:
        """Return the optimizer of one tensor."""
        copy = nn.Parameter(self.empty(parameter))
        if config.optimizer == "adamw8bit":
            return bitsandbytes().optim.AdamW8bit([copy], **settings)
        return torch.optim.AdamW([copy], fused=self.fused or None, **settings)

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
        while self.coming:
            self.coming.pop(0)()
        self.steps += 1
        self.squares.clear()

    def norm(self) -> float:
        """Length of all gradients of this step together."""
        return float(torch.stack(self.squares).sum().sqrt()) if self.squares else 0.0

    @torch.no_grad()
    def update(self, parameter: nn.Parameter) -> None:
        """One step of one tensor; its gradient is gone afterwards.

        With `offload_state` the step is done when the next tensor is on its way to the CPU."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self.squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float32).square())
        seed = hash((self.seed, self.steps, len(self.squares))) % 2**63
        if self.home is None:
            self.compute(parameter, parameter.data, gradient, seed)
            return
        weight, gradient_there = (to_host(each, self.home) for each in (parameter.data, gradient))
        wait = arrived(parameter.device)

        def finish() -> None:
            wait()
            self.compute(parameter, weight, gradient_there, seed)

        self.coming.append(finish)
        if len(self.coming) > 1:
            self.coming.pop(0)()

    def compute(self, parameter: nn.Parameter, weight: Tensor, gradient: Tensor, seed: int) -> None:
        """Step in float32 where the state is, and put the result into the parameter."""
        inner = self.each[parameter]
        inner.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        (copy,) = inner.param_groups[0]["params"]
        copy.data = weight.to(torch.float32)
        copy.grad = gradient.to(torch.float32)
        step_one(inner, copy)
        copy.grad = None
        if parameter.dtype == torch.bfloat16:
            copy.data = round_stochastically(
                copy.data, None if copy.is_meta else torch.Generator(copy.device).manual_seed(seed)
            )
        to_device(copy.data, parameter.data)
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
            fused = inner.param_groups[0].get("fused")  # a matter of speed, not of the run
            inner.load_state_dict(own)
            if "fused" in inner.param_groups[0]:
                inner.param_groups[0]["fused"] = fused


def step_one(optimizer: Any, parameter: nn.Parameter) -> None:
    """Step an optimizer that has one parameter, without waiting for the GPU.

    The `step` of bitsandbytes waits after each tensor, which serves optimizers in paged memory."""
    if not hasattr(optimizer, "update_step"):
        optimizer.step()
        return
    if not optimizer.initialized:
        optimizer.check_overrides()
        optimizer.to_gpu()
        optimizer.initialized = True
    (group,) = optimizer.param_groups
    if not optimizer.state[parameter]:
        optimizer.init_state(group, parameter, 0, 0)
    optimizer.update_step(group, parameter, 0, 0)
