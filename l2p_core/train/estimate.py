"""What a training step will hold in memory, without a byte of weights: the step runs on tensors
that have only a shape.

Those are on a CPU, because torch without CUDA can't run a backward pass on shapes of a GPU. Where
kernels of the two keep different things, the GPU's are put in (`FusedNorm`, the fused AdamW); and
nothing runs under autocast that the two cast differently (tests/test_train_devices.py)."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from ..files.layout import read_layout
from ..files.load import check
from ..flow import flow_matching_loss
from ..meter import Meter, bytes_of, shapes_only
from ..text import MAX_TOKENS
from .buckets import target_size
from .config import TrainConfig
from .low_memory import FrozenLinear
from .prepare import compute_dtype, make_optimizer, prepare, reject_quantized, trained_of

HOST = "meta"  # stands for the memory beside the device's


def estimate(config: TrainConfig) -> dict[str, int]:
    """Bytes that one process holds at the peak of a step, by what they are for, and their sum as
    "total"; then what it keeps in the CPU's memory, where a GPU's is meant by the rest.

    Reads the checkpoint's header alone, and neither the data nor the text encoder: images are of
    `height` x `width`, or of the trained resolution, resized to `max_pixels`; captions of 512
    tokens. The kernels are a GPU's, unless `device` is cpu. Raises CheckpointError, and ValueError
    where `shard` is set."""
    if config.shard:
        raise ValueError(
            f"shard is {config.shard}, and what is counted is a process that holds everything;"
            " leave shard out"
        )
    layout = read_layout(Path(config.checkpoint))
    check(layout)
    reject_quantized(layout)
    height, width = (
        (config.height, config.width)
        if config.height
        else target_size(
            *layout.trained_size,
            config.max_area(math.prod(layout.trained_size)),
            layout.config.size_multiple,
        )
    )
    dtype = compute_dtype(config)
    model = layout.config.build().to(dtype)
    on_gpu = config.device != "cpu"
    prepare(model, config, norm=fused_norm if on_gpu else F.rms_norm)
    with shapes_only(model), Meter(elsewhere=HOST) as meter:
        swapped = to_host(model)
        trained = trained_of(model)
        # bitsandbytes and Prodigy look at numbers.
        by_numbers = config.optimizer in ("adamw8bit", "prodigy")
        stands_in = replace(config, optimizer="adamw") if by_numbers else config
        optimizer = make_optimizer(trained, stands_in, HOST, on_gpu)
        image = torch.empty(config.batch, 3, height, width)
        captions = [
            torch.empty(MAX_TOKENS, layout.config.cap_feat_dim, dtype=dtype)
            for _ in range(config.batch)
        ]

        def step() -> int:
            """Returns what all gradients together take."""
            keeping = (
                saved_tensors_hooks(lambda tensor: tensor.to(HOST), lambda kept: kept.to("cpu"))
                if config.offload_activations
                else nullcontext()
            )
            bfloat16 = dtype == torch.bfloat16
            autocast = torch.autocast("cpu", torch.bfloat16, bfloat16, cache_enabled=False)
            with autocast, keeping:
                loss = flow_matching_loss(
                    model, image, captions, torch.empty_like(image), torch.empty(config.batch)
                )
            loss.backward()
            gradients = bytes_of(parameter.grad for parameter in trained.values())
            optimizer.step()
            optimizer.zero_grad()
            return gradients

        for parameter in trained.values():
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # makes its state
        optimizer.zero_grad()
        started, lasting = len(meter.events), meter.now()
        gradients = step()
        passing = meter.peak(since=started) - lasting - gradients
        state = bytes_of(tree_leaves(optimizer.state_dict()))
    if config.optimizer == "adamw8bit":
        state = sum(state_in_8_bits(parameter.numel()) for parameter in trained.values())
    if config.optimizer == "prodigy":  # means, first weights and numerator
        state = sum(16 * parameter.numel() for parameter in trained.values())
    learned = bytes_of(trained.values())
    parts = {
        "weights that are trained": learned,
        "frozen weights": bytes_of(model.state_dict().values()) - learned - swapped,
        **(
            {"EMA of the weights": 4 * sum(each.numel() for each in trained.values())}
            if config.ema
            else {}
        ),
        "gradients": gradients,
        "optimizer state": 0 if config.offload_state else state,
        "activations and buffers": passing,
    }
    there = swapped + (state if config.offload_state else 0)
    beside = {"in the CPU's memory": there} if there else {}
    return {**parts, "total": sum(parts.values()), **beside}


def to_host(model: nn.Module) -> int:
    """Put swapped weights where nothing is counted, and return their bytes."""
    swapped = [
        module for module in model.modules() if isinstance(module, FrozenLinear) and module.swapped
    ]
    for module in swapped:
        module.weight = nn.Parameter(module.weight.detach().to(HOST), requires_grad=False)
    return bytes_of(module.weight for module in swapped)


class FusedNorm(torch.autograd.Function):
    """What CUDA's RMSNorm keeps: its input, its weight, and a float32 for each row. No numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """(..., D) → (..., D)."""
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients' shapes."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fused_norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    """`FusedNorm` with the arguments of `F.rms_norm`."""
    return FusedNorm.apply(x, weight)


def state_in_8_bits(count: int) -> int:
    """Bytes of bitsandbytes' AdamW for a tensor of so many numbers: two means of each, with a
    float32 scale for every 256 of them and two tables of 256 levels; a tensor below 4096 keeps
    float32."""
    return 8 * count if count < 4096 else 2 * count + 2 * 4 * -(-count // 256) + 2 * 4 * 256
