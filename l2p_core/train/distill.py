"""A checkpoint becomes a fast one, on prompts alone: `l2p distill`.

The student starts as its teacher and learns to do in one step what the teacher does in several with
guidance: guidance distillation and progressive distillation, of diffusion models in arXiv
2210.03142 and 2202.00512, here for the velocity of a flow. It learns from noisy images that it came
to itself, from pure noise (backward distillation, arXiv 2405.05224). So no images are needed, and
it learns to mend its own errors."""

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..files.layout import defaults_metadata, read_layout
from ..flow import euler, guided_velocity, schedule, shifted
from ..pipeline import draw_noise
from ..settings import checked
from ..tables import read_rows
from .data import Batch, Batches
from .dataset import Data, Example
from .distill_config import DistillConfig
from .pause import swapped_weights
from .run import Run, run_in_folder

PATH = 8  # steps from noise to a noisy image, where the student's own number does not say it


def distill(config: DistillConfig, progress: bool = True) -> Path:
    """Distil, or resume the run in `config.output`. Returns the last step file.

    Ends as `train` does, and raises what it raises."""
    return run_in_folder(DistillRun, config, progress)


class PromptBatches(Batches):
    """Batches of prompts and noise, without images. All of a batch have one sigma."""

    config: DistillConfig

    def passes(self, number: int) -> list[Batch]:
        """Return this process's prompts of a step, as one batch for each size."""
        order = self._row(number)
        sigma = self.sigma(number)
        batches = []
        for places in self._passes(order):
            examples = [self.examples[order[place]] for place in places]
            seeds = [self.generator(number, place).initial_seed() for place in places]
            batches.append(
                Batch(
                    torch.empty(0),
                    [self.encodings[example.captions[0]] for example in examples],
                    draw_noise((len(places), 3, *examples[0].size), seeds),
                    torch.full((len(places),), sigma),
                )
            )
        return batches

    def sigma(self, number: int) -> float:
        """Return the sigma of a batch. Batches in a row take all of the student's in turn, in
        random order.

        A student without steps of its own learns every sigma: any of the part of the schedule whose
        turn it is."""
        steps = self.config.student_steps
        turn, place = divmod(number, steps or PATH)
        order = torch.randperm(steps or PATH, generator=self.generator("order of sigmas", turn))
        within = torch.zeros(())
        if not steps:
            within = torch.rand((), generator=self.generator("sigma", number))
        even = 1 - (order[place] + within) / (steps or PATH)
        return shifted(even, self.config.shift).item()


def shift_of(config: DistillConfig) -> float:
    """Return the shift of the student's schedule: as set, or the checkpoint's own.

    Raises CheckpointError."""
    layout = read_layout(Path(config.checkpoint))
    return config.shift or float(layout.default_settings.get("shift", layout.config.shift))


class DistillRun(Run):
    """A run whose target is the teacher's velocity, or where several of its steps lead."""

    batches_of = PromptBatches
    nouns = "prompt", "prompt"
    config: DistillConfig

    def __init__(self, config: DistillConfig, progress: bool):
        cache = config.cache or str(Path(config.output) / "encodings")
        super().__init__(replace(config, cache=cache, shift=shift_of(config)), progress)

    def read_data(self, max_pixels: int, multiple: int, step_images: int) -> Data:
        """Return the prompts as examples without images.

        Fewer prompts than a step takes are repeated: their noise differs."""
        self.set_defaults()
        config, file = self.config, Path(self.config.prompts)
        size = {"height": config.height or None, "width": config.width or None}
        examples = []
        for number, row in enumerate(read_rows(file), 1):
            own = {name: row[name] for name in size if row.get(name) is not None}
            try:
                prompt = str(checked("prompt", row.get("prompt", row.get("text"))))
                settings = self.pipe.complete({**size, **own})
            except ValueError as error:
                raise ValueError(f"{file.name}, prompt {number}: {error}") from None
            digest = hashlib.sha256(prompt.encode()).hexdigest()
            examples.append(
                Example(
                    file,
                    (prompt,),
                    None,
                    (settings.height, settings.width),
                    f"prompt {number}",
                    digest,
                    digest,
                )
            )
        if config.held_out >= len(examples):
            raise ValueError(
                f"held_out is {config.held_out}, and {file.name} holds {len(examples)} prompts;"
                " expected fewer"
            )
        repeats = math.ceil(step_images / (len(examples) - config.held_out))
        return Data(examples, [repeats] * len(examples), [])

    def set_defaults(self) -> None:
        """Note the teacher's guidance scale, and set the defaults of the result, by which samples
        are generated too."""
        config, layout = self.config, self.pipe.layout
        self.guidance = config.teacher_guidance or self.pipe.defaults.cfg_scale
        learned: dict[str, str | int | float] = {"cfg_scale": 1.0, "shift": config.shift}
        if config.student_steps:
            learned |= {"num_inference_steps": config.student_steps, "sampler": "euler"}
        layout.metadata |= defaults_metadata({**layout.default_settings, **learned})

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Keep the weights as they are now, before a state is loaded: the teacher's."""
        self.teacher = {name: weight.detach().clone() for name, weight in self.trained.items()}
        self.no_prompt = self.encodings[""].to(self.device)
        return super().make_optimizer()

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of where the student's step leads, in units of a mean step's length.

        So a step counts by the square of its length: the last one, which is the longest, leaves its
        error in the image, and no later step mends it."""
        with self.autocast(cache=False):  # which would take the student's weights for the teacher's
            x, target, length = self.example(batch)
            velocity = -self.model(x, 1 - batch.sigma, batch.captions)
        return length**2 * torch.nn.functional.mse_loss(velocity.float(), target)

    @torch.no_grad()
    def example(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """Return a noisy image that the student comes to from pure noise, the velocity that it
        should have there, and its step's length in units of a mean one; 1 where it has no steps of
        its own."""
        config, model, captions = self.config, self.pipe.transformer, batch.captions
        count, sigma = config.student_steps or PATH, batch.sigma[0].item()
        levels = schedule(count, shift=config.shift)
        done = int((levels > sigma + 1e-5).sum())
        path = torch.cat([levels[:done], torch.tensor([sigma])])
        x = euler(guided_velocity(model, captions, captions, 1.0), batch.noise, path)
        negatives = [self.no_prompt] * len(captions)
        with swapped_weights(self.trained, self.teacher):
            velocity = guided_velocity(model, captions, negatives, self.guidance)
            if not config.student_steps:
                return x, velocity(x, sigma), 1.0
            substeps = config.teacher_substeps
            fine = schedule(count * substeps, shift=config.shift)[done * substeps :][: substeps + 1]
            end = euler(velocity, x, fine)
        length = (fine[0] - fine[-1]).item()
        return x, (x - end) / length, count * length
