"""Accelerators: which one is used by default, in which dtype, and how much memory it has.

Any accelerator that torch supports is taken (CUDA, ROCm under the name cuda, XPU, MPS). Only CPUs
were at hand when this was written."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Weights. A smaller model takes at most 400 MB in float32.
SMALL = 100_000_000
# Weights times tokens of a pass. Below, threads wait for one another longer than they compute: on a
# machine whose cores are busy, a thousand times longer.
LITTLE_WORK = 1_000_000_000


def default_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    if hasattr(torch, "accelerator"):  # torch 2.6 and newer
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device, weights: int | None = None) -> torch.dtype:
    """Return the dtype in which a model of so many weights, by default a large one, computes.

    It is bfloat16; float16 on a CUDA card that has no bfloat16 arithmetic, Turing and older;
    float32 for a small model on a CPU, of which most have none. float16 may overflow; generation
    detects this and says so."""
    if device.type == "cpu" and weights is not None and weights < SMALL:
        return torch.float32
    if device.type != "cuda" or torch.version.hip:
        return torch.bfloat16
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


@contextmanager
def threads_for(work: int, device: torch.device) -> Iterator[None]:
    """Compute on one thread within, where a pass on a CPU is little work: see `LITTLE_WORK`.

    What the user chose by OMP_NUM_THREADS stays. Afterwards torch has as many threads as before."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or work > LITTLE_WORK or "OMP_NUM_THREADS" in os.environ:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of an accelerator's memory; None for a CPU, or where torch cannot
    tell."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    tell = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    if device.type == "cpu" or tell is None:
        return None
    return tell(device)[0]


def memory_counter(device: torch.device) -> Any:
    """Return the module of torch that counts a device's memory: torch.cuda, also for ROCm, or
    torch.xpu. None for a CPU and for MPS, where torch keeps no peak."""
    module = getattr(torch, device.type, None)
    return module if hasattr(module, "max_memory_allocated") else None


def empty_cache(device: torch.device) -> None:
    """Give memory that torch holds in reserve back to the accelerator."""
    release = of_accelerator(device, "empty_cache")
    if release is not None:
        release()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    wait = of_accelerator(device, "synchronize")
    if wait is not None:
        wait()


def of_accelerator(device: torch.device, name: str) -> Callable | None:
    """Return the function of torch.accelerator; where this torch lacks it, of torch.cuda and its
    like. None for a CPU."""
    if device.type == "cpu":
        return None
    older = getattr(getattr(torch, device.type, None), name, None)
    return getattr(getattr(torch, "accelerator", None), name, older)
