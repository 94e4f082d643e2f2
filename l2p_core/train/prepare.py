"""What a run trains, in which dtype, and with which optimizer and learning rate."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..files.header import CheckpointError
from ..files.layout import Layout
from ..model import L2PTransformer
from .adapters import add_adapter
from .config import TrainConfig, layers_of
from .data import Batch
from .low_memory import quantize_frozen
from .optimizers import PerTensorOptimizer, muon_and_adamw, prodigy


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What is computed in, and what frozen weights and step files are stored in."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def reject_quantized(layout: Layout) -> None:
    """Raises CheckpointError."""
    if layout.quantization:
        raise CheckpointError(
            f"{layout.path.name} is quantized ({layout.quantization}); train the BF16 or FP32 model"
        )


Norm = Callable[[Tensor, list[int], Tensor, float], Tensor]


def prepare(
    model: L2PTransformer,
    config: TrainConfig,
    device: torch.device | None = None,
    norm: Norm = F.rms_norm,
) -> dict[str, nn.Parameter]:
    """Freeze what stays, put the rest into what it is trained in, and return it by name.

    device: to put it on, of what is quantized each linear by itself; None leaves all where it is.
    norm: computes RMSNorm."""
    model.train()
    keep_dtypes(model, norm)
    frozen = model.main_blocks if config.lora_rank else model.main_blocks[layers_of(config.freeze)]
    for part in (*frozen, *(model.shared_parts if frozen else ())):
        part.requires_grad_(False)
    swapped = round(config.swap_blocks * len(frozen))
    for index, block in enumerate(frozen):
        if config.quantize_frozen or index < swapped:
            quantize_frozen(block, config.quantize_frozen, device, index < swapped)
    if config.lora_rank:
        add_adapter(model, config)
    trained = trained_of(model)
    for parameter in trained.values():
        dtype = torch.bfloat16 if config.stochastic_rounding else torch.float32
        parameter.data = parameter.data.to(
            device, dtype, copy=True
        )  # the file it is mapped from is not written to
    if device:
        model.to(device)
    blocks = model.blocks
    if config.compile_blocks:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if config.checkpointing:
        for part in (*blocks, model.local_decoder):
            part.forward = partial(
                checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False
            )
    return trained


def keep_dtypes(model: L2PTransformer, norm: Norm) -> None:
    """Let norms and nearest upsampling give the dtype they are given.

    CUDA's autocast computes them in float32, a CPU's does not. What follows in the block is then
    float32 too, and so is what is kept for the backward pass. The norm's own sum is in float32
    anyway. Its weight is cast as autocast casts that of a linear: in one dtype, CUDA's kernel
    keeps only its input (torch 2.8 or newer)."""

    def plain(function: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *rest)

    def of(module: nn.RMSNorm, x: Tensor) -> Tensor:
        assert module.eps is not None
        return norm(x, list(module.normalized_shape), module.weight.to(x.dtype), module.eps)

    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = partial(plain, partial(of, module))
        elif isinstance(module, (nn.LayerNorm, nn.Upsample)):
            module.forward = partial(plain, module.forward)
    decoder = model.local_decoder
    decoder.resize = partial(plain, decoder.resize)  # type: ignore[method-assign]


def trained_of(model: L2PTransformer) -> dict[str, nn.Parameter]:
    """The trained parameters by name."""
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def make_optimizer(
    trained: dict[str, nn.Parameter],
    config: TrainConfig,
    host: str = "cpu",
    on_gpu: bool = False,
) -> torch.optim.Optimizer:
    """The published one, or the same in less memory.

    host: where it may keep its state. on_gpu: whether that of a GPU is meant where there is
    none."""
    on_gpu = on_gpu or any(parameter.is_cuda for parameter in trained.values())
    settings = {
        "lr": config.learning_rate,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "muon":
        return muon_and_adamw(trained, settings)
    if config.optimizer == "prodigy":
        return prodigy(trained, settings)
    if config.optimizer == "adamw" and not (
        config.offload_state or config.stochastic_rounding or config.step_in_backward
    ):
        # Unfused on a GPU, it holds a copy of all weights there.
        return torch.optim.AdamW(trained.values(), fused=on_gpu or None, **settings)
    return PerTensorOptimizer(trained.values(), config, host, on_gpu, **settings)


def rate_at(step: int, config: TrainConfig) -> float:
    """What the learning rate is multiplied by for the step after `step`."""
    warm = min((step + 1) / config.warmup, 1) if config.warmup else 1
    match config.schedule:
        case "published":  # torch's ConstantLR as it comes
            return 1 / 3 if step < 5 else 1
        case "linear":
            return warm * (1 - step / config.steps)
        case "cosine":
            return warm * (1 + math.cos(math.pi * step / config.steps)) / 2
    return warm


def moved(batch: Batch, move: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with each of its tensors moved."""
    return replace(
        batch,
        images=move(batch.images),
        captions=[move(caption) for caption in batch.captions],
        noise=move(batch.noise),
        sigma=move(batch.sigma),
        weight=None if batch.weight is None else move(batch.weight),
    )


def pinned(batch: Batch) -> Batch:
    """The batch in pinned memory."""
    return moved(batch, Tensor.pin_memory)


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, its copies queued."""
    return moved(batch, lambda tensor: tensor.to(device, non_blocking=True))
