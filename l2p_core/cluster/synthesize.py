"""Images to train on, by the actors of a Ray cluster: `l2p synthesize --ray`."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from ..pipeline import usable_device
from ..train.config import SynthesizeConfig
from ..train.synthesize import (
    Planned,
    generate_group,
    image_settings,
    open_pipeline,
    reject_other_components,
)
from .connect import connected
from .files import keep, write_or_pack
from .pool import Pool
from .slots import Slot, find_slot


class SynthesisWorker:
    """An actor that generates with the latent model. See `generate`."""

    def __init__(
        self,
        model: Path,
        config: SynthesizeConfig,
        dtype: torch.dtype,
        slot: Slot,
        collect: bool,
    ):
        self._model, self._config, self._dtype = model, config, dtype
        self._slot, self._collect = slot, collect

    def start(self) -> None:
        """Load the model."""
        if self._slot.threads:
            torch.set_num_threads(self._slot.threads)
        device = usable_device(self._slot.device())
        self._pipe: Any = open_pipeline(self._model, device, self._dtype)

    def run(self, group: list[Planned]) -> list[bytes | None]:
        """Generate a batch, and write its images or return them."""
        images = generate_group(self._pipe, group, self._config)
        return [
            write_or_pack(
                image,
                each.file,
                image_settings(self._model, self._config, each),
                self._collect,
            )
            for each, image in zip(group, images, strict=True)
        ]


def generate(
    groups: list[list[Planned]],
    model: Path,
    config: SynthesizeConfig,
    dtype: torch.dtype,
    address: str,
    device: str | None,
    collect: bool,
) -> Iterator[int]:
    """Generate these batches over a cluster, and yield the number of images of each that is done.

    address: see `connected`. device: "cpu" where GPUs are not to be used. collect: write all files
    here. Raises ValueError, CheckpointError for the model."""
    reject_other_components(model)
    model = model.absolute()
    size = sum(file.stat().st_size for file in model.glob("*/*.safetensors"))
    with connected(address):
        slot = find_slot(device, size)
        pool: Pool[list[Planned]] = Pool(
            slot,
            SynthesisWorker,
            (model, config, dtype, slot, collect),
            lambda group: (group,),
        )
        with closing(pool):
            for group, sent in pool.run(groups):
                for each, png in zip(group, sent, strict=True):
                    keep(each.file, png)
                yield len(group)
