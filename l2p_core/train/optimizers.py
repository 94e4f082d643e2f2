"""Optimizers that update one tensor at a time, so that little has to be in memory at once."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..files.naming import ALL_STACKS
from .config import TrainConfig
from .low_memory import bitsandbytes, round_stochastically
from .transfer import arrived, to_device, to_host


class PerTensorOptimizer(torch.optim.Optimizer):
    """AdamW or Adafactor, one tensor at a time, over a float32 copy that is there only meanwhile.
    By the configuration:

    optimizer = "adamw8bit": its state in 8 bits, by bitsandbytes; "adafactor": a row and a column
    of state for each matrix, by transformers; offload_state: state and
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
        if config.optimizer == "adafactor":
            from transformers.optimization import Adafactor

            # The rate is the run's, as of AdamW, not relative to the weights.
            own = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
            rates = {name: settings[name] for name in ("lr", "weight_decay")}
            return Adafactor([copy], **rates, **own)
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


FrugalAdamW = PerTensorOptimizer  # its name before it knew Adafactor


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers as one."""

    def __init__(self, *each: torch.optim.Optimizer):
        self.each = each
        super().__init__([group for one in each for group in one.param_groups], {})

    def step(self, closure: None = None) -> None:
        """Step all optimizers."""
        for one in self.each:
            one.step()

    def state_dict(self) -> dict:
        """The states of all optimizers."""
        return {"each": [one.state_dict() for one in self.each]}

    def load_state_dict(self, state: dict) -> None:
        """Continue from saved states."""
        for one, its in zip(self.each, state["each"], strict=True):
            one.load_state_dict(its)
        self.param_groups = [group for one in self.each for group in one.param_groups]


def muon_and_adamw(trained: dict[str, nn.Parameter], settings: dict[str, Any]) -> CombinedOptimizer:
    """Return torch's Muon (https://kellerjordan.github.io/posts/muon) for the matrices of blocks,
    and AdamW for all else. Muon's steps have the length of AdamW's (arXiv 2502.16982), so that one
    learning rate serves both. Raises ImportError."""
    if not hasattr(torch.optim, "Muon"):
        raise ImportError(
            f"this is torch {torch.__version__}, and Muon came with 2.9: pip install -U torch"
        )
    blocks = tuple(f"{stack}." for stack in ALL_STACKS)
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trained.items():
        is_matrix = parameter.dim() == 2 and name.startswith(blocks)
        (matrices if is_matrix else others).append(parameter)
    rates = {name: settings[name] for name in ("lr", "weight_decay")}
    each: list[torch.optim.Optimizer] = []
    if matrices:
        each.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **rates))
    if others:
        fused = any(parameter.is_cuda for parameter in others)
        each.append(torch.optim.AdamW(others, fused=fused or None, **settings))
    return CombinedOptimizer(*each)


def prodigy(trained: dict[str, nn.Parameter], settings: dict[str, Any]) -> torch.optim.Optimizer:
    """Return Prodigy (arXiv 2306.06101), which finds the learning rate. Raises ImportError."""
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise ImportError(
            "the optimizer prodigy needs prodigyopt: pip install 'comfyui-l2p[prodigy]'"
        ) from None
    own = {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True}
    return Prodigy(trained.values(), **settings, **own)


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
