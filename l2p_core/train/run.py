"""The training loop, on Hugging Face accelerate. A run is a folder:

config.toml            every setting it was started with
report.html            settings, data, loss curve and samples on one page
log.csv, loss.png      a row for each step, and the curve, with the validation loss in red
held_out.csv           the validation loss; tensorboard/ holds both, if TensorBoard is installed
samples/, samples.png  images of the same prompts as training progresses, and all in one image
step-N.safetensors     the trained tensors under the published names, or a LoRA
resume.pt              the state from which a run resumes, bit for bit on a CPU
"""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from ..files.atomic import WAIT, WriteError, atomic_write, locked, process_rank
from ..files.header import hash_files
from ..files.layout import Layout
from ..files.load import load_model
from ..flow import flow_matching_loss, loss_weights
from ..interrupt import Noted, noted
from ..pipeline import L2PPipeline
from ..prefetch import ahead
from ..text import encoder_files
from ..tokenizer import find_tokenizer
from .adapters import read_first_lora, start_from_lora
from .boards import Boards, import_wandb
from .buckets import planned_as_before, report, target_size
from .config import OWN_RECIPES, TrainConfig, to_toml
from .data import Batch, Batches, Encodings, Example, hold_out
from .dataset import Data, cache_folder, read_data
from .launch import exact_float32, memory, reset_peak, start_processes
from .pause import Stopped, stoppable, swapped_weights
from .prepare import (
    compute_dtype,
    make_optimizer,
    on_device,
    pinned,
    prepare,
    rate_at,
    reject_quantized,
    trained_of,
)
from .record import Log, Row, draw_curves, samples_file, show_samples
from .report import describe_data, write_report
from .resume import check_run, first_line, load_state, save_step, step_file
from .samples import Sample, read_samples
from .shard import gather, reshard, shard
from .transfer import saved_on_host


def train(config: TrainConfig, progress: bool = True) -> Path:
    """Train, or resume the run in `config.output`. Returns the last step file.

    An interrupt or SIGTERM saves the state and raises KeyboardInterrupt: in training at the end of
    the step, in sampling at once. An error saves the state too, if the weights are those of a whole
    step. Raises ValueError for settings and data that do not fit, before anything is trained, and
    where the loss diverges; CheckpointError for files; AlreadyRunning where another run still
    trains in that folder after `WAIT` seconds."""
    return run_in_folder(find_recipe(config.recipe), config, progress)


def run_in_folder(recipe: type["Run"], config: TrainConfig, progress: bool) -> Path:
    """Do what `train` says with a run of this kind."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a folder as the output")
    busy = f"another run is training in {output}. Wait for it to finish, or give another output"
    with (
        nullcontext() if process_rank() else locked(output, busy, WAIT, folder=True),
        exact_float32() if config.mixed_precision == "no" else nullcontext(),
    ):  # the first process locks for all
        return recipe(config, progress).train()


def find_recipe(name: str) -> type["Run"]:
    """The class that "module:Class" names, and `Run` by itself for "". Raises ValueError.

    This imports the module: whoever calls it must have the name from the user, not from a file
    (`read_config`)."""
    if not name:
        return Run
    module, _, attribute = name.partition(":")
    try:
        if name in OWN_RECIPES:
            name_here = module.rpartition(".")[2]
            found = getattr(import_module(f"..shapes.{name_here}", __package__), attribute)
        else:
            found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"recipe is {name!r}, which can't be had ({error}); expected module:Class"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Run)):
        raise ValueError(f"recipe is {name!r}, which is no subclass of {__name__}.Run")
    return found


def check_packages(config: TrainConfig) -> None:
    """Raise ImportError where a package is missing that the run needs later."""
    eight_bits = config.optimizer == "adamw8bit" or config.quantize_frozen == "nf4"
    for package, needed, extra in (
        ("peft", config.lora_rank, "train"),
        ("bitsandbytes", eight_bits, "low-memory"),
    ):
        if needed and find_spec(package) is None:
            raise ImportError(f"these settings need {package}: pip install 'comfyui-l2p[{extra}]'")
    if config.wandb_project:
        import_wandb()


class Diverged(ValueError):
    """The loss is not one to go on with."""


class Run:
    """A run set up: model, data, optimizer and folder, at the step where it resumes.

    A recipe is a subclass. It may make its files before anything is read (`__init__`), and replace
    the batch (`batch`), the loss (`loss`), the optimizer (`make_optimizer`) and the samples
    (`sample`); see shapes/train.py. It may also take its examples from elsewhere (`read_data`,
    `batches_of`); see distill.py."""

    batches_of: type[Batches] = Batches
    nouns = "image", "caption"  # what an example and its text are called

    def __init__(self, config: TrainConfig, progress: bool):
        self.config, self.output, self.dtype = config, Path(config.output), compute_dtype(config)
        self.accelerator = start_processes(config)
        self.processes, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        self.progress = progress and self.main
        self.interrupted = Noted()
        self.consistent = True  # no optimizer step is half done
        check_run(self.output, config)
        check_packages(config)

        self.pipe = self._open_checkpoint()
        layout = self.pipe.layout
        first_lora, lora_changes = (
            read_first_lora(config, layout) if config.resume_lora else (None, {})
        )
        samples = read_samples(config, self.pipe)
        max_pixels = config.max_area(math.prod(layout.trained_size))
        multiple = layout.config.size_multiple
        data = self.read_data(max_pixels, multiple, self.processes * config.batch)
        examples = data.examples
        trained_on, held_out = hold_out(data.main, config.held_out, config.seed)
        learned = data.epoch(trained_on)

        self.sample_size = Counter(example.size for example in examples).most_common(1)[0][0]
        first_captions = dict.fromkeys(example.captions[0] for example in examples)
        self.samples = samples or [Sample(caption) for caption in first_captions][:4]
        self.encodings = Encodings(cache_folder(config), self.pipe)
        self._encode(examples)
        self.batches = self.batches_of(
            learned, self.encodings, config, layout.config.patch_size, self.processes, self.rank
        )
        self.held_out = self._batches_held_out(held_out)
        self.about_data = describe_data(data, learned, held_out, self.batches.size, self.nouns)
        if self.progress:
            print(report(learned, self.batches.size, self.nouns[0]), file=sys.stderr)

        self.trained = self._prepare_model()
        start_from_lora(self.trained, lora_changes, config)
        self.ema = (
            {name: parameter.detach().float().clone() for name, parameter in self.trained.items()}
            if config.ema
            else {}
        )
        self.saved_tensors = self.trained | {
            f"ema.{name}": tensor for name, tensor in self.ema.items()
        }
        optimizer = self.make_optimizer()
        self.inputs = self.identity(examples, first_lora) if self.main else {}
        batching = partial(self.batching, data, max_pixels, config.size_step or multiple)
        self.step = self.saved = self._resume(optimizer, batching)

        self.optimizer = self.accelerator.prepare(optimizer, device_placement=[False])
        self.model = self.pipe.transformer
        if not config.shard:
            self.model = self.accelerator.prepare(self.model)
        boards = Boards(config, self.step) if self.main else None
        self.log = Log(self.output, self.step, self.main, boards)
        if self.main:
            with atomic_write(self.output / "config.toml") as stream:
                stream.write(to_toml(config).encode())

    def _open_checkpoint(self) -> L2PPipeline:
        """Read the checkpoint's header and check all settings that it has a say in; its weights are
        loaded later. Missing files are reported here, before images are read."""
        config = self.config
        pipe = L2PPipeline.from_pretrained(
            config.checkpoint,
            config.text_encoder or None,
            config.tokenizer or None,
            self.device,
            self.dtype,
            progress=self.progress,
            offload=False,
        )
        layout = pipe.layout
        reject_quantized(layout)
        if config.height:
            pipe.check_size(config.height, config.width)
            # what it generates best from now on
            layout.metadata["modelspec.resolution"] = f"{config.width}x{config.height}"
        if config.size_step % (multiple := layout.config.size_multiple):
            raise ValueError(
                f"size_step is {config.size_step}; this checkpoint needs multiples of {multiple}"
                " pixels, so give one"
            )
        encoder_files(pipe.text_encoder_path)
        find_tokenizer(pipe.text_encoder_path, pipe.tokenizer_path)
        return pipe

    def _encode(self, examples: list[Example]) -> None:
        """Encode every text of the run. Each process encodes its share, into the cache."""
        texts = dict.fromkeys(
            [
                "",
                *(each.prompt for each in self.samples),
                *(each.negative_prompt for each in self.samples),
                *(caption for example in examples for caption in example.captions),
            ]
        )
        # What is in the cache is left out before the rest is shared out: all take equally long.
        missing = [text for text in texts if not self.encodings.file(text).exists()]
        self.accelerator.wait_for_everyone()
        self.encodings.add(missing[self.rank :: self.processes], self.progress)
        self.accelerator.wait_for_everyone()
        if not all(self.encodings.file(text).exists() for text in texts):
            raise ValueError(
                f"{self.encodings.folder} lacks captions that other processes encoded; give a cache"
                " that all machines share"
            )

    def _batches_held_out(self, examples: list[Example]) -> Batches | None:
        """Return the validation set one image at a time, with all of its captions."""
        if not examples:
            return None
        one_by_one = replace(self.config, caption_dropout=0.0, batch=1)
        patch_size = self.pipe.layout.config.patch_size
        return self.batches_of(examples, self.encodings, one_by_one, patch_size)

    def _prepare_model(self) -> dict[str, nn.Parameter]:
        """Load the model and make it ready to train. Return what is trained, by name."""
        config, pipe = self.config, self.pipe
        if config.shard or config.quantize_frozen or config.swap_blocks:
            # the device gets its part of each block, or linears one at a time
            pipe.transformer = load_model(pipe.layout, "cpu", self.dtype)
        trained = prepare(pipe.transformer, config, None if config.shard else self.device)
        if not config.shard:
            return trained
        shard(
            pipe.transformer,
            self.device,
            weights=config.shard == "all",
            dtype=self.dtype if self.dtype == torch.bfloat16 else None,
        )
        return trained_of(pipe.transformer)

    def _resume(
        self, optimizer: torch.optim.Optimizer, batching: Callable[[], tuple[str, bool]]
    ) -> int:
        """Load the state of the run in the folder, if there is one. Return the step it is at.

        batching: calls `self.batching`. That plans a whole epoch, so only a resumed run does it."""
        file, step = self.output / "resume.pt", 0
        if file.exists():
            step = load_state(
                file, self.saved_tensors, optimizer, self.batches.size, self.inputs, batching()
            )
        steps = self.accelerator.gather(torch.tensor([step], device=self.device))
        if len(set(steps.tolist())) > 1:
            raise ValueError(
                f"not all processes find the run in {self.output}, or not the same; give a folder"
                " that all machines share"
            )
        return step

    def read_data(self, max_pixels: int, multiple: int, step_images: int) -> Data:
        """Return what is trained on; the arguments are those of `dataset.read_data`."""
        return read_data(self.config, max_pixels, multiple, step_images, self.progress)

    def identity(self, examples: list[Example], first_lora: Layout | None) -> dict[str, object]:
        """Hashes of what the run learns from, which stay the same where files are moved. Images in
        the order of the metadata, as the validation set and the batches follow from it."""
        maker = self.encodings.maker
        return {
            "checkpoint": hash_files(self.pipe.layout.files),
            "text encoder": maker["text_encoder_sha256"],
            "tokenizer": maker["tokenizer_and_config_sha256"],
            "LoRA": hash_files(first_lora.files) if first_lora else None,
            "images": [[example.name, example.digest] for example in examples],
        }

    def batching(self, data: Data, max_pixels: int, multiple: int) -> tuple[str, bool]:
        """Return the hash of the batches, and whether the first version made the same ones."""
        fixed = (self.config.height, self.config.width)
        own_sizes = all(
            each.size == (fixed if fixed[0] else target_size(*each.pixels, max_pixels, multiple))
            for each in data.examples
            if each.pixels
        )
        same_rows = planned_as_before(self.batches.examples, self.config.batch, self.processes)
        return self.batches.fingerprint(), own_sizes and same_rows and not self.config.held_out

    def make_optimizer(self) -> torch.optim.Optimizer:
        """For `trained`, and for what else the loss trains: that goes into `saved_tensors`, by
        name, to be there when a run resumes."""
        return make_optimizer(self.trained, self.config)

    def batch(self, number: int) -> Batch:
        """Called in a thread of its own, while the batch before is trained on. It must follow from
        the number alone."""
        return self.batches[number]

    def passes(self, number: int) -> list[Batch]:
        """Return what this process takes through the model for a batch: one `Batch` for each size.

        A recipe that replaces `batch` gets one."""
        if type(self).batch is Run.batch and self.batches.is_mixed(number):
            return self.batches.passes(number)
        return [self.batch(number)]

    def pinned_passes(self, number: int) -> list[Batch]:
        """`passes`, in memory from which copies to a GPU are queued."""
        passes = self.passes(number)
        return [pinned(batch) for batch in passes] if self.device.type == "cuda" else passes

    def loss(self, batch: Batch) -> Tensor:
        """What the gradient is taken of."""
        weight = batch.weight
        if self.config.loss_weighting != "none":
            of_sigma = loss_weights(self.config.loss_weighting, batch.sigma)[:, None, None, None]
            weight = of_sigma if weight is None else of_sigma * weight
        return flow_matching_loss(
            self.model, batch.images, batch.captions, batch.noise, batch.sigma, weight
        )

    def train(self) -> Path:
        """Step after step to the end, with saves and samples on the way."""
        config, first = self.config, self.step
        due = False
        with ExitStack() as stack:
            batches = stack.enter_context(
                closing(ahead(map(self.pinned_passes, count(first * config.accumulate))))
            )
            stack.enter_context(self.log)
            self.interrupted = stack.enter_context(noted())
            bar = stack.enter_context(
                tqdm(total=config.steps, initial=first, unit="step", disable=not self.progress)
            )
            left_out = not (first and samples_file(self.output, first).exists())  # as after a stop
            if self.sampling_due() and left_out and self.look():
                raise self.interrupted.error()
            reset_peak(self.device)
            while self.step < config.steps:
                step = self.step
                try:
                    asked = self.learn(batches)
                except Exception as error:
                    self.rescue(error)
                    raise
                if self.step > step:
                    bar.update()
                    bar.set_postfix({"loss": f"{self.log.mean():.4f}", **memory(self.device)})
                samples = self.sampling_due() and self.step > step and not asked
                due = due or self.step % config.save_every == 0
                if (
                    asked
                    and self.step > self.saved
                    or due
                    and self.log.steady()
                    or self.step == config.steps
                ):
                    self.save()
                    due = False
                elif samples and self.log.steady():
                    self.save_state(self.state())
                if samples:
                    asked = self.look()
                    reset_peak(self.device)  # the bar shows what a step of training holds
                    if asked and self.step > self.saved:
                        self.save()
                if asked:
                    self.leave()
                    raise self.interrupted.error()
        if (
            self.step == first and not step_file(self.output, self.step).exists()
        ):  # fewer steps were asked for than are done
            self.save()
        self.leave()
        return step_file(self.output, self.step)

    def sampling_due(self) -> bool:
        """Whether this step ends with samples."""
        return bool(self.config.sample_every and self.step % self.config.sample_every == 0)

    def leave(self) -> None:
        """All processes together: a launcher ends those that are behind the first."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def look(self) -> bool:
        """How far it is: the validation loss and, where this process generates, samples. Returns
        whether an interrupt ended that, and with it the run: not where other processes, of which
        none generates a recipe's samples, go on to the next step, which tells them.

        An error is a warning, as the state is saved; but not where other processes would wait for
        this one."""
        alone = self.processes == 1
        shared = type(self).sample is Run.sample  # a recipe's own is for one process
        generates = self.main or self.config.shard or shared
        tasks = [(self.validate, "the validation loss", alone)] if self.held_out else []
        tasks += [(self.sample, "samples", alone or not self.config.shard)] if generates else []
        for task, name, independent in tasks:
            try:
                with (
                    stoppable(self.pipe.transformer, self.interrupted)
                    if independent
                    else nullcontext()
                ):
                    task()
            except Stopped:
                return alone or bool(self.config.shard) or shared
            except Exception as error:
                if not independent:
                    raise
                warnings.warn(
                    f"{name} at step {self.step} failed ({first_line(error)}); training continues",
                    stacklevel=2,
                )
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
        if self.main:
            self.draw_curves()
        return False

    def validate(self) -> None:
        """Log the loss of the validation set."""
        assert self.held_out is not None  # else nothing asks for it
        images, processes = self.held_out.per_epoch, self.processes
        total = torch.zeros((), device=self.device)
        with torch.no_grad(), self.sampling():
            for first in range(0, images, processes):  # all processes run the model as often
                self.stop_together(processes > 1)
                number = first + self.rank
                loss = self.loss(on_device(self.held_out[number % images], self.device))
                total += loss if number < images else 0
        self.log.add_held_out(self.step, self.accelerator.reduce(total, "sum").item() / images)

    def stop_together(self, together: bool) -> None:
        """Raise Stopped after an interrupt; `together`, where all processes are at this place,
        after one of any."""
        asked = self.interrupted.is_set()
        if together:
            asked = (
                self.accelerator.reduce(
                    torch.tensor(float(asked), device=self.device), "sum"
                ).item()
                > 0
            )
        if asked:
            raise Stopped

    def learn(self, batches: Iterator[list[Batch]]) -> bool:
        """One step of the optimizer. Returns whether any process was interrupted by now: a single
        process then leaves out a step of which batches are still missing.

        Raises Diverged, and nothing of the step is saved, where the loss is not what one continues
        with."""
        began, config = monotonic(), self.config
        rate = config.learning_rate * rate_at(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1)
        loss = torch.zeros((), device=self.device)
        self.consistent = not config.step_in_backward
        for part in range(config.accumulate):
            if part and self.interrupted.is_set() and self.processes == 1:
                self.optimizer.zero_grad()
                return True
            passes = next(batches)
            images = sum(len(batch.sigma) for batch in passes)
            for place, batch in enumerate(passes, 1):
                last = part == config.accumulate - 1 and place == len(passes)
                share = len(batch.sigma) / images / config.accumulate
                loss += self.backward(on_device(batch, self.device), share, last)
        if config.step_in_backward:
            norm = self.optimizer.optimizer.norm()
        else:
            norm = self.accelerator.clip_grad_norm_(
                self.trained.values(), config.max_grad_norm or math.inf
            )
        asked, loss = self.accelerator.reduce(
            torch.stack([loss.new_tensor(float(self.interrupted.is_set())), loss]), "mean"
        ).tolist()
        self.log.add(Row(self.step + 1, loss, rate, float(gather(norm, True)), monotonic() - began))
        if why := self.log.trouble():
            raise Diverged(
                f"{why} at step {self.step + 1}, so training stopped. The last good state is step"
                f" {self.saved}, in {self.output}; take a lower learning_rate than"
                f" {config.learning_rate:g}, or look at the data of the last steps"
            )
        self.consistent = False
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        for name, mean in self.ema.items():
            mean.lerp_(
                self.trained[name].detach().float(),
                1 - min(config.ema, self.step / (9 + self.step)),
            )
        self.consistent = True
        return asked > 0

    def backward(self, batch: Batch, share: float, last: bool) -> Tensor:
        """Add a batch's share of the step to the gradients, and return its share of the loss.

        last: of the step, where processes exchange gradients."""
        keeping = saved_on_host() if self.config.offload_activations else nullcontext()
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            # Each weight is used once in a pass: a cache would only hold copies until its end.
            with self.autocast(cache=False), keeping:
                loss = self.loss(batch)
            self.accelerator.backward(loss * share)
        return loss.detach() * share

    def rescue(self, error: Exception) -> None:
        """Save the state after an error in a step, where the weights are those of the last whole
        step and worth keeping. A split model's processes would have to take part, and may be
        elsewhere."""
        good = self.consistent and self.step > self.saved and self.log.steady()
        if not good or self.config.shard or isinstance(error, (Diverged, WriteError)):
            return
        try:
            self.optimizer.zero_grad()  # an error may be of too little memory
            self.save_state(self.state())
            warnings.warn(
                f"an error ended training; the state of step {self.step} is saved in {self.output}",
                stacklevel=2,
            )
        except Exception as second:
            warnings.warn(
                f"the state of step {self.step} could not be saved ({first_line(second)})",
                stacklevel=2,
            )

    def autocast(self, cache: bool = True) -> AbstractContextManager:
        """The context in which the model computes. cache: keep the weights cast to bfloat16, for
        the passes that follow in it."""
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.mixed_precision == "bf16",
            cache_enabled=cache,
        )

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Within it the pipeline generates as step files would."""
        cache = self.config.shard != "all"
        with self.autocast(cache), swapped_weights(self.trained, self.ema):
            yield
            reshard(self.model)

    def state(self) -> dict[str, Any]:
        """What resume.pt holds; whole tensors in the main process."""
        return {
            "step": self.step,
            "size": self.batches.size,
            "inputs": self.inputs,
            "batching": self.batches.fingerprint(),
            "tensors": gather(self.saved_tensors, self.main),
            "optimizer": gather(self.optimizer.state_dict(), self.main),
        }

    def save(self) -> None:
        """Write the step file, and the state to resume from."""
        state = self.state()
        if self.main:
            learned = {
                name: state["tensors"][f"ema.{name}" if self.ema else name] for name in self.trained
            }
            save_step(
                self.output,
                self.step,
                learned,
                self.dtype,
                self.config,
                self.pipe.layout,
            )
        self.save_state(state)

    def save_state(self, state: dict[str, object]) -> None:
        """Write the state to resume from."""
        if self.main:
            with atomic_write(self.output / "resume.pt") as stream:
                torch.save(state, stream)
            self.draw_curves()
        self.saved = self.step

    def draw_curves(self) -> None:
        """Draw loss.png anew, and write report.html."""
        if self.log.rows:
            draw_curves(
                [[(row.step, row.loss) for row in self.log.rows], self.log.held_out],
                self.output / "loss.png",
            )
        prompts = [each.prompt for each in self.samples]
        write_report(self.config, self.step, self.about_data, self.log, prompts)

    def sample(self) -> None:
        """A row of samples: each prompt by its own settings, its number the seed where none is
        given.

        Processes that hold the whole model each take their share of the prompts."""
        prompts = range(len(self.samples))
        if self.processes == 1 or self.config.shard:
            images = self.generate(prompts)
        else:
            own = prompts[self.rank :: self.processes]
            images = self.gathered(partial(self.generate, own))
        if self.main:
            row = show_samples(
                [images[number] for number in sorted(images)], self.output, self.step
            )
            if self.log.boards:
                self.log.boards.add_samples(row, self.step)

    def generate(self, numbers: Iterable[int]) -> dict[int, Image.Image]:
        """Return the samples of these numbers, by number."""
        height, width = self.sample_size
        together = bool(self.config.shard)
        own: dict[str, Any] = {
            "height": height,
            "width": width,
            "num_inference_steps": self.config.sample_steps or None,
        }
        images = {}
        with self.sampling():
            for number in numbers:
                sample = self.samples[number]
                images[number] = self.pipe(
                    prompt_embeds=self.encodings[sample.prompt],
                    negative_prompt_embeds=self.encodings[sample.negative_prompt],
                    callback=lambda *_: self.stop_together(together),
                    **{**own, "seed": number, **sample.settings},
                )
        return images

    def gathered(self, work: Callable[[], dict]) -> dict:
        """Return what all processes' work gives, in each of them. Where one is stopped or fails,
        all are told, so that none waits for another: raises Stopped or RuntimeError."""
        from accelerate.utils import gather_object

        done, stopped, failed = {}, False, ""
        try:
            done = work()
        except Stopped:
            stopped = True
        except Exception as error:
            failed = first_line(error)
        of_all = gather_object([(done, stopped, failed)])
        if any(stopped for _, stopped, _ in of_all):
            raise Stopped
        if failures := [failed for _, _, failed in of_all if failed]:
            raise RuntimeError(failures[0])
        return {key: value for done, _, _ in of_all for key, value in done.items()}
