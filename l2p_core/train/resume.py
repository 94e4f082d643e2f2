"""The files of a run: its trained tensors, and the state from which it resumes."""

import os
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..files.atomic import atomic_write
from ..files.header import CheckpointError
from ..files.layout import Layout, defaults_metadata
from ..files.save import save_tensors
from .adapters import saved, saved_name
from .config import TrainConfig, read_config_of, to_toml
from .shard import as_split_as, is_split

# What may change when a run resumes: a loss that diverged may need other steps, and the rest is not
# learned from.
FREE = (
    "steps",
    "learning_rate",
    "max_grad_norm",
    "batch",
    "buckets",
    "save_every",
    "keep",
    "sample_every",
    "sample_prompts",
    "sample_file",
    "sample_steps",
    "wandb_project",
    "device",
    "cache",
    "checkpointing",
    "offload_activations",
    "swap_blocks",
    "compile_blocks",
    "shard",
)  # of `batch` and `buckets`, `load_state` looks at what all processes take
PATHS = (
    "checkpoint",
    "data",
    "prompts",
    "text_encoder",
    "tokenizer",
    "output",
    "caption_column",
    "trigger",
    "regularization",
    "resume_lora",
)  # compared by content, see `Run.identity`


def check_run(output: Path, config: TrainConfig) -> None:
    """Raises ValueError where the folder holds a run with settings that would teach something
    else."""
    if not (output / "config.toml").is_file():
        if any(os.path.lexists(output / name) for name in ("config.toml", "resume.pt")):
            raise ValueError(f"{output} holds something else than a run; give another output")
        return
    if not (output / "resume.pt").exists():  # nothing is learned yet
        return
    before = read_config_of(type(config), output / "config.toml", {}, of_run=True)
    for each in fields(config):
        if each.name not in (*FREE, *PATHS) and (was := getattr(before, each.name)) != (
            now := getattr(config, each.name)
        ):
            raise ValueError(
                f"{output} holds a run with {each.name} {was!r}, now {now!r}; give another output,"
                " or go on as it was"
            )


def step_file(output: Path, step: int) -> Path:
    """Where the trained tensors of a step are written."""
    return output / f"step-{step}.safetensors"


def save_step(
    output: Path,
    step: int,
    trained: dict[str, nn.Parameter],
    dtype: torch.dtype,
    config: TrainConfig,
    base: Layout,
) -> None:
    """Write step-N.safetensors and take away those before it that are more than `config.keep`
    behind.

    base: the checkpoint, whose trained resolution and default settings the file has too."""
    height, width = base.trained_size
    tensors = {
        saved_name(name): saved(name, parameter.detach(), config).to("cpu", dtype)
        for name, parameter in trained.items()
    }
    metadata = {
        "format": "pt",
        "l2p.step": str(step),
        "l2p.config": to_toml(config),
        "modelspec.resolution": f"{width}x{height}",
        **defaults_metadata(base.default_settings),
    }
    with atomic_write(step_file(output, step)) as stream:
        save_tensors(stream, tensors, metadata)
    numbers = sorted(
        int(file.stem[5:]) for file in output.glob("step-*.safetensors") if file.stem[5:].isdigit()
    )
    for number in (
        [number for number in numbers if number <= step][: -config.keep] if config.keep else []
    ):
        step_file(output, number).unlink()


def load_state(
    file: Path,
    tensors: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    size: int,
    inputs: dict[str, object] | None = None,
    batching: tuple[str, bool] | None = None,
) -> int:
    """Put a saved state back and return its step.

    size: images that all processes together take at once. inputs: what the run learns from now, see
    `Run.identity`; batching: see `Run.batching`; neither is compared where there is none. Raises
    CheckpointError where the file can't be read, ValueError where it is of another run."""
    elsewhere = any(is_split(tensor) or tensor.device.type != "cpu" for tensor in tensors.values())
    state = read_state(file, elsewhere)
    if state.get("size", size) != size:
        raise ValueError(
            f"{file} is of a run that takes {state['size']} images at once, now {size}; give a"
            f" batch that is, over all processes, {state['size']}"
        )
    if inputs:
        compare_inputs(file, state.get("inputs"), inputs)
    if batching:
        compare_batching(file, state.get("batching"), *batching)
    if missing := [name for name in tensors if name not in state["tensors"]]:
        raise ValueError(
            f"{file} lacks {len(missing)} of {len(tensors)} trained tensors (first: {missing[0]}):"
            " it was saved by another recipe, or version of this program. Give another output"
        )
    for name, tensor in tensors.items():
        saved = state["tensors"][name]
        if not isinstance(saved, Tensor) or saved.shape != tensor.shape:
            found = tuple(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
            raise damaged(file, f"{name} is {found}, expected {tuple(tensor.shape)}")
        tensor.data.copy_(as_split_as(tensor, saved))
    state["optimizer"] = tree_map(
        lambda value: value.clone() if isinstance(value, Tensor) and value.dim() == 0 else value,
        state["optimizer"],
    )  # optimizers take counts as they are, and each would keep the file open
    try:
        parameters = [
            parameter for group in optimizer.param_groups for parameter in group["params"]
        ]
        for number, its in (
            state["optimizer"].get("state", {}).items()
        ):  # split before the optimizer takes them to the device
            its.update(
                {name: as_split_as(parameters[number], value) for name, value in its.items()}
            )
        optimizer.load_state_dict(state["optimizer"])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(file, f"its optimizer's state does not fit: {first_line(error)}") from None
    return state["step"]


def read_state(file: Path, mmap: bool) -> dict:
    """The contents of a resume.pt. Raises CheckpointError where it is empty, damaged or something
    else."""
    if not file.is_file():
        raise CheckpointError(
            f"{file} is no file; a run keeps its state there. Give another output"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a damaged file seems to be
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # whatever torch makes of a damaged file
        raise damaged(file, first_line(error) if file.stat().st_size else "it is empty") from None
    kinds = {"step": int, "tensors": dict, "optimizer": dict}
    if not isinstance(state, dict) or not all(
        isinstance(state.get(name), kind) for name, kind in kinds.items()
    ):
        raise damaged(file, "it is no state of a run")
    return state


def damaged(file: Path, why: str) -> CheckpointError:
    """The error for a resume.pt that can't be read."""
    return CheckpointError(
        f"{file} can't be read ({why}), so this run can't be resumed. Restore the file; or move it"
        " and the step files away to start anew"
    )


def compare_batching(file: Path, before: object, now: str, as_first_version: bool) -> None:
    """Raise ValueError where a run would resume with other batches than it began with."""
    if before is None and not as_first_version:
        raise ValueError(
            f"{file.parent} holds a run of an earlier version, which chose the validation set and"
            " the batches of images of several sizes in another way, so it can't be resumed"
            " exactly. Finish it with that version, or give another output"
        )
    if before is not None and before != now:
        raise ValueError(
            f"{file.parent} holds a run with other batches: buckets, the repeats of data or"
            " regularization have changed. Give what it began with, or another output"
        )


def compare_inputs(file: Path, before: object, now: dict[str, Any]) -> None:
    """Raise ValueError, saying what changed, where a run would resume on other contents than it
    began with."""
    if not isinstance(before, dict):
        warnings.warn(
            f"{file} was saved by an earlier version, which kept no hashes of the checkpoint and"
            " the images; whether they are the same is not checked",
            stacklevel=3,
        )
        return
    run = file.parent
    for name in ("checkpoint", "text encoder", "tokenizer", "LoRA"):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{run} holds a run with another {name}: its contents have changed. Give the one it"
                " began with, or another output"
            )
    was: list = before.get("images", [])
    images: list = now["images"]
    if was == images:
        return
    digests = [[digest for _, digest in rows] for rows in (was, images)]
    if digests[0] == digests[1]:  # files were renamed
        return
    if Counter(digests[0]) == Counter(digests[1]):
        what = "the rows of the metadata are in another order"
    else:
        known = set(digests[0])
        new = [name for name, digest in images if digest not in known]
        kept = set(digests[1])
        gone = [name for name, digest in was if digest not in kept]
        what = (
            f"{len(was)} images then and {len(images)} now; {len(new)} are new or have another"
            " image, caption or seed"
            + (f" (first: {new[0]})" if new else "")
            + f", {len(gone)} are gone"
            + (f" (first: {gone[0]})" if gone else "")
        )
    raise ValueError(
        f"{run} holds a run on other data: {what}. The validation set and the order of the images"
        " follow from them. Restore the data, or give another output"
    )


def first_line(error: BaseException) -> str:
    """An error in one line: what it says or, if that is nothing, its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
