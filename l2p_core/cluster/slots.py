"""What an actor takes of a Ray cluster: a GPU, or a CPU where there is none."""

from dataclasses import dataclass
from typing import Any

import torch

from ..devices import default_device, default_dtype
from ..pipeline import L2PPipeline
from ..text import encoder_files


@dataclass(frozen=True)
class Slot:
    """What one actor takes.

    kind: "GPU" or "CPU". memory: bytes of the machine's memory, for actors without a GPU."""

    kind: str
    memory: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What Ray is told of an actor."""
        if self.kind == "GPU":
            return {"num_cpus": 1, "num_gpus": 1}
        return {"num_cpus": 1, "num_gpus": 0, "memory": self.memory}

    @property
    def threads(self) -> int | None:
        """Threads of an actor, None for torch's own number."""
        return None if self.kind == "GPU" else 1

    def device(self) -> str:
        """In an actor: what it computes on. Ray shows it one GPU."""
        return "cpu" if self.kind == "CPU" else str(default_device())

    def dtype(self, pipe: L2PPipeline) -> torch.dtype:
        """The dtype that suits a model: one for the whole cluster, so that its images do not
        depend on who generates them."""
        if self.kind == "CPU":
            return default_dtype(torch.device("cpu"), pipe.layout.parameters)
        here = default_device()
        return torch.bfloat16 if here.type == "cpu" else default_dtype(here)

    def count(self) -> int:
        """How many actors have room in the cluster, other work aside."""
        import ray

        return sum(self._count_on(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def _count_on(self, node: dict[str, float]) -> int:
        actors = min(node.get("CPU", 0), node.get(self.kind, 0))
        if self.memory:
            actors = min(actors, node.get("memory", 0) // self.memory)
        return int(actors)


def find_slot(device: str | None, files: int) -> Slot:
    """Return what one actor takes: a GPU, or a CPU where the cluster has none or `device` is "cpu".

    files: bytes that it loads. Raises ValueError where there is no room for a single one."""
    import ray

    if device not in (None, "cpu"):
        raise ValueError(f"--device is {device}; Ray chooses the GPUs. Leave it out, or give cpu")
    has_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    slot = Slot("GPU") if has_gpu and device is None else Slot("CPU", files)
    if slot.count() < 1:
        needed = "a GPU" if slot.kind == "GPU" else f"{files / 1e9:.2f} GB of memory"
        raise ValueError(f"no machine of the Ray cluster has a CPU and {needed} for the model")
    return slot


def loaded_bytes(pipe: L2PPipeline) -> int:
    """Bytes of the files of model and text encoder."""
    files = [*pipe.layout.files, *encoder_files(pipe.text_encoder_path)]
    return sum(file.stat().st_size for file in files)
