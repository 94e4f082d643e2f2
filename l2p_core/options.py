"""What a process that only generates loads: `l2p serve` and Ray start such processes."""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from .devices import free_memory
from .pipeline import L2PPipeline
from .settings import CompleteSettings


@dataclass(frozen=True)
class PipelineOptions:
    """What to load, as `L2PPipeline.from_pretrained` takes it; it can be pickled."""

    arguments: dict[str, Any]
    threads: int | None = None  # of the CPU, for this worker; None for all
    batch: int = 1  # images at a time, for which there has to be memory
    loras: tuple[tuple[str, float], ...] = ()  # files and strengths
    largest: CompleteSettings | None = None  # image to plan for; None for the trained resolution

    def for_another_machine(self, dtype: torch.dtype) -> "PipelineOptions":
        """Return the same for a process elsewhere: with whole paths, and a dtype that is not its
        own choice."""
        paths = {
            name: os.path.abspath(path)
            for name in ("checkpoint", "text_encoder", "tokenizer")
            if (path := self.arguments[name]) is not None
        }
        loras = tuple((os.path.abspath(file), strength) for file, strength in self.loras)
        arguments = {**self.arguments, **paths, "torch_dtype": dtype, "progress": False}
        return replace(self, arguments=arguments, loras=loras)

    def open(self, device: str) -> L2PPipeline:
        """Open the checkpoint, of which only the header is read for now."""
        pipe = L2PPipeline.from_pretrained(**self.arguments, device=device)
        for file, strength in self.loras:
            pipe.load_lora(file, strength)
        return pipe

    def load(self, device: str) -> L2PPipeline:
        """Load model and text encoder to the device."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        pipe = self.open(device)
        if free_memory(pipe.device) is not None:
            placement = pipe.place(self.largest or pipe.complete({}), self.batch)
            # Prompts keep coming, so an encoder without room beside the model stays on the CPU.
            on_cpu = placement.encode_on_cpu or placement.free_text_encoder
            pipe.adopt(placement._replace(encode_on_cpu=on_cpu))
        pipe.encode_prompt("")
        assert pipe.transformer is not None  # loaded here
        return pipe
