"""Accelerators: which one is used by default, in which dtype, and how much memory it has.

Any accelerator that torch supports is taken (CUDA, ROCm under the name cuda, XPU, MPS). Only CPUs
were at hand when this was written."""

import torch


def default_device() -> torch.device:
    """Return the accelerator where there is one, else the CPU."""
    if hasattr(torch, "accelerator"):  # torch 2.6 and newer
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return found or torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16, or float16 on a CUDA card that has no bfloat16 arithmetic: Turing and
    older.

    float16 may overflow; generation detects this and says so."""
    if device.type != "cuda" or torch.version.hip:
        return torch.bfloat16
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else torch.float16


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of an accelerator's memory; None for a CPU, or where torch cannot
    tell."""
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    tell = getattr(getattr(torch, device.type, None), "mem_get_info", None)
    if device.type == "cpu" or tell is None:
        return None
    return tell(device)[0]


def empty_cache(device: torch.device) -> None:
    """Give memory that torch holds in reserve back to the accelerator."""
    release = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if device.type != "cpu" and release is not None:
        release()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    wait = getattr(getattr(torch, device.type, None), "synchronize", None)
    if device.type != "cpu" and wait is not None:
        wait()
