"""What a run generates as training progresses: prompts, each with its own settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..batch import INPUTS
from ..pipeline import L2PPipeline
from ..tables import read_rows
from .config import TrainConfig


@dataclass(frozen=True)
class Sample:
    """One image of a sheet. settings: those of `L2PPipeline` that differ from the run's own."""

    prompt: str
    negative_prompt: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def read_samples(config: TrainConfig, pipe: L2PPipeline) -> list[Sample]:
    """Return the samples of `config.sample_file` or `config.sample_prompts`, none without either.

    Raises ValueError, with the row's number, for a setting that does not fit."""
    if not config.sample_file:
        return [Sample(prompt) for prompt in config.sample_prompts]
    file = Path(config.sample_file)
    samples = []
    for number, row in enumerate(read_rows(file), 1):
        given = {name: value for name, value in row.items() if value is not None}
        given.pop("file_name", None)
        prompt = given.pop("text", given.pop("prompt", ""))
        try:
            if unfit := [name for name in INPUTS if name in given]:
                raise ValueError(f"{unfit[0]} is not for samples, which start from noise")
            checked = pipe.complete({"prompt": prompt, **given})
            pipe.plan_stages(checked)
        except ValueError as error:
            raise ValueError(f"{file.name}, sample {number}: {error}") from None
        settings = {name: getattr(checked, name) for name in given if name != "negative_prompt"}
        samples.append(Sample(checked.prompt, checked.negative_prompt, settings))
    return samples
