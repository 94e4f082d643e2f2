"""What a launcher set up: the processes of a run, and the device of each."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch

from ..devices import memory_counter
from .config import TrainConfig

# Of processes with the one that writes files. All share sampling and encoding, so a longer silence
# means that one is gone.
PATIENCE = timedelta(minutes=30)


def start_processes(config: TrainConfig) -> Any:
    """Return accelerate's Accelerator, which joins the processes of a run.

    Raises ImportError without accelerate, ValueError where the launcher is set up for what this
    run can't do."""
    try:
        from accelerate import (
            Accelerator,
            DistributedDataParallelKwargs,
            InitProcessGroupKwargs,
        )
        from accelerate.utils import GradientAccumulationPlugin
    except ImportError:
        raise ImportError("training needs accelerate: pip install 'comfyui-l2p[train]'") from None
    check_launcher()
    accelerator = Accelerator(
        mixed_precision="no",  # `Run.autocast` sees to it
        cpu=config.device == "cpu",
        # `Run.learn` divides by itself; the argument of that name would give way to the environment
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    check_dtype(config, accelerator.device)
    check_processes(config, accelerator)
    return accelerator


def check_launcher() -> None:
    """Reject or name what a launcher is set up for and training does by its own settings.

    Before accelerate reads it: without DeepSpeed, for one, it only asks to install it. Raises
    ValueError."""
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"accelerate is set up for {name}, which this program does not use. Set it up for"
                " several GPUs alone (accelerate config), and split the model by --shard state, as"
                " ZeRO-2 does, or --shard all, as ZeRO-3 does"
            )
    given = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if given not in ("", "1"):
        warnings.warn(
            f"accelerate is set to accumulate gradients over {given} batches, which is ignored;"
            f" give accumulate {given} for that",
            stacklevel=4,
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("", "no", "bf16"):
        warnings.warn(
            f"accelerate is set to {precision}, which is ignored; mixed_precision says what"
            " training computes in",
            stacklevel=4,
        )


def check_dtype(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError where a GPU computes bfloat16 only by emulation, at a fraction of its
    speed."""
    if config.mixed_precision == "bf16" and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and major < 8:
            raise ValueError(
                f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no"
                " bfloat16, and float16 overflows in this model's training. Take a card of the RTX"
                " 30 series or newer, or mixed_precision 'no', which computes in float32"
            )


def check_processes(config: TrainConfig, accelerator: Any) -> None:
    """Raise ValueError for settings that do not go with the number of processes."""
    processes = accelerator.num_processes
    if config.step_in_backward and processes > 1:
        raise ValueError(
            f"step_in_backward is for one process, and here are {processes}; leave it off"
        )
    if config.shard and processes == 1:
        raise ValueError(
            f"shard is {config.shard}, and there is one process; start several by accelerate"
            " launch, or leave it off"
        )
    if accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
        raise ValueError(
            f"accelerate is set up for {accelerator.distributed_type.value}; set it up for several"
            " processes alone, and split the model by shard"
        )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within it a GPU computes float32 in float32. By default its convolutions use TF32, which has
    10 bits of mantissa."""
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = False
        yield
    finally:
        for kind, value in zip(kinds, before):
            kind.allow_tf32 = value


def reset_peak(device: torch.device) -> None:
    """Forget what a GPU held so far, in loading or sampling."""
    counter = memory_counter(device)
    if counter is not None:
        counter.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, str]:
    """The most that a GPU held in the steps since `reset_peak`, for the progress bar."""
    counter = memory_counter(device)
    if counter is None:
        return {}
    return {"memory": f"{counter.max_memory_allocated(device) / 1e9:.1f} GB"}
