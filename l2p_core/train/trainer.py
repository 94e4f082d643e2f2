"""The training loop, on Hugging Face accelerate. A run is a folder:

    config.toml          every setting it was started with
    log.csv, loss.png    a row for each step, and their curve; tensorboard/ the same where TensorBoard is installed
    samples/, samples.png   the same prompts drawn as training goes on, and the rows below one another
    step-N.safetensors   the trained tensors under the published names: l2p merge puts them over the checkpoint; or a LoRA
    resume.pt            where a stopped run goes on, bit for bit on a CPU
"""
import csv
import math
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from threading import current_thread, main_thread
from time import monotonic
from typing import TYPE_CHECKING

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..header import CheckpointError, whole
from ..model import L2PTransformer
from ..pipeline import L2PPipeline
from .config import TrainConfig, layers_of, read_config, to_toml
from .curve import draw_curve
from .data import Batch, Batches, Encodings, read_samples
from .loss import flow_matching_loss

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# What may change when a run goes on; all else decides what it learns.
FREE = ("steps", "save_every", "keep", "sample_every", "sample_prompts", "sample_steps", "device", "cache", "checkpointing")
WINDOW, DIVERGED = 100, 3  # a mean loss over so many steps that is so many times the lowest before it
LORA_TARGETS = r"layers\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"
SHEET_ROWS, SHEET_SIDE = 12, 256  # of samples.png


@dataclass
class Row:
    """One line of the log."""
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


def train(config: TrainConfig, progress: bool = True) -> Path:
    """Train, or go on where the run in `config.output` stopped. Returns the last step file.

    An interrupt is answered at the end of the step, when all is saved. Raises ValueError for settings and data that do not
    fit, before anything is trained, and where the loss diverges; CheckpointError for files."""
    try:
        from accelerate import Accelerator
    except ImportError:
        raise ImportError("training needs accelerate: pip install 'comfyui-l2p[train]'") from None
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")
    progress = progress and accelerator.is_main_process
    output = Path(config.output)
    check_run(output, config)
    dtype = compute_dtype(config)
    pipe = L2PPipeline.from_pretrained(config.checkpoint, config.text_encoder or None, config.tokenizer or None,
                                       accelerator.device, dtype, progress=progress)
    if pipe.layout.quantization:
        raise CheckpointError(f"{pipe.layout.path.name} is quantized ({pipe.layout.quantization}); train the BF16 or FP32 model")
    trained_height, trained_width = pipe.layout.trained_size
    samples = read_samples(Path(config.data), config.height and (config.height, config.width) or None,
                           config.max_pixels or trained_height * trained_width, pipe.layout.config.size_multiple, progress)
    if config.height:
        pipe.check_size(config.height, config.width)
    prompts = config.sample_prompts or tuple(dict.fromkeys(sample.caption for sample in samples))[:4]
    with accelerator.main_process_first():
        encodings = Encodings(Path(config.cache or Path(config.data) / "encodings"), pipe)
        encodings.add(["", *prompts, *(sample.caption for sample in samples)], progress)
    batches = Batches(samples, encodings, config, pipe.layout.config.patch_size, accelerator.num_processes, accelerator.process_index)

    model = pipe.transformer
    trained = prepare(model, config)
    optimizer = make_optimizer(trained, config)
    log, board = Log(output / "log.csv", accelerator.is_main_process), None
    step = load(output / "resume.pt", trained, optimizer, accelerator.device) if (output / "resume.pt").exists() else 0
    log.go_back_to(step)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.toml").write_text(to_toml(config), encoding="utf-8")
        board = tensorboard(output, step)

    def save() -> None:
        if accelerator.is_main_process:
            save_step(output, step, trained, dtype, config)
            with whole(output / "resume.pt") as part:
                torch.save({"step": step, "trained": trained, "optimizer": optimizer.state_dict()}, part)
            draw_curve([(row.step, row.loss) for row in log.rows], output / "loss.png")

    def draw() -> None:
        if accelerator.is_main_process and config.sample_every:
            size = max({sample.size for sample in samples}, key=[sample.size for sample in samples].count)
            with accelerator.autocast():
                draw_samples(pipe, encodings, prompts, size, config.sample_steps, output, step)

    saved = step
    if step == 0:
        draw()
    with (ThreadPoolExecutor(1) as reader, board or nullcontext(), interrupts() as interrupted,
          tqdm(total=config.steps, initial=step, unit="step", disable=not progress) as bar):
        coming = reader.submit(batches.__getitem__, step * config.accumulate)  # read while the one before trains
        while step < config.steps:
            began = monotonic()
            rate = config.learning_rate * rate_at(step, config)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = 0.0
            for part in range(config.accumulate):
                batch = on_device(coming.result(), accelerator.device)
                coming = reader.submit(batches.__getitem__, step * config.accumulate + part + 1)
                with accelerator.no_sync(wrapped) if part < config.accumulate - 1 else nullcontext():
                    part_loss = flow_matching_loss(wrapped, batch.pictures, batch.captions, batch.noise, batch.sigma)
                    accelerator.backward(part_loss / config.accumulate)
                loss += part_loss.detach() / config.accumulate
            norm = accelerator.clip_grad_norm_(trained.values(), config.max_grad_norm or math.inf)
            asked, loss = accelerator.reduce(torch.stack([loss.new_tensor(float(interrupted.is_set)), loss]), "mean").tolist()
            log.add(Row(step + 1, loss, rate, float(norm), monotonic() - began))
            if board:
                for name, value in (("loss", loss), ("learning_rate", rate), ("grad_norm", norm)):
                    board.add_scalar(name, value, step + 1)
            if why := log.trouble():
                raise ValueError(f"{why} at step {step + 1}, so training stopped. The last good state is step {saved}, in {output}; take a "
                                 f"lower learning_rate than {config.learning_rate:g}, or look at the data of the last steps")
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix({"loss": f"{log.mean():.4f}", **memory(accelerator.device)})
            last = step == config.steps or asked > 0
            if step % config.save_every == 0 or last:
                save()
                saved = step
            if config.sample_every and step % config.sample_every == 0 and not asked:
                draw()
            if asked:
                raise KeyboardInterrupt
    accelerator.wait_for_everyone()
    return step_file(output, step)


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What is computed in, and what frozen weights and step files are stored in."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def check_run(output: Path, config: TrainConfig) -> None:
    """Raises ValueError where the folder holds a run with settings that would teach something else."""
    if not (output / "config.toml").exists():
        if (output / "resume.pt").exists() or output.is_file():
            raise ValueError(f"{output} holds something else than a run; give another output")
        return
    before = read_config(output / "config.toml", {})
    for each in fields(TrainConfig):
        if each.name not in (*FREE, "output") and (was := getattr(before, each.name)) != (now := getattr(config, each.name)):
            raise ValueError(f"{output} holds a run with {each.name} {was!r}, now {now!r}; give another output, or go on as it was")


def prepare(model: L2PTransformer, config: TrainConfig) -> dict[str, nn.Parameter]:
    """Freeze what stays, put the rest into float32, and return it by name."""
    model.train()
    if config.lora_rank:
        add_lora(model, config)
    for layer in () if config.lora_rank else model.layers[layers_of(config.freeze)]:
        layer.requires_grad_(False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for parameter in trained.values():
        parameter.data = parameter.data.to(torch.float32, copy=True)  # the file it is mapped from is not written to
    if config.checkpointing:
        for part in (*model.noise_refiner, *model.context_refiner, *model.layers, model.local_decoder):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
    return trained


def add_lora(model: L2PTransformer, config: TrainConfig) -> None:
    """Put a LoRA beside every linear of the main layers, its scale (alpha / rank) 1, and freeze all else."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ImportError("training a LoRA needs peft: pip install 'comfyui-l2p[train]'") from None
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=LORA_TARGETS), model)


def saved_name(name: str) -> str:
    """A trained tensor's name in a step file: the published one; a LoRA's as ai-toolkit and ComfyUI have it."""
    return f"diffusion_model.{name.replace('.default.', '.')}" if ".lora_" in name else name


def make_optimizer(trained: dict[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """The published one."""
    return torch.optim.AdamW(trained.values(), lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=config.weight_decay)


def rate_at(step: int, config: TrainConfig) -> float:
    """What the learning rate is multiplied by for the step after `step`."""
    warm = min((step + 1) / config.warmup, 1) if config.warmup else 1
    match config.schedule:
        case "published":  # torch's ConstantLR as it comes
            return 1 / 3 if step < 5 else 1
        case "linear":
            return warm * (1 - step / config.steps)
        case "cosine":
            return warm * (1 + math.cos(math.pi * step / config.steps)) / 2
    return warm


def on_device(batch: Batch, device: torch.device) -> Batch:
    return Batch(batch.pictures.to(device), [caption.to(device) for caption in batch.captions], batch.noise.to(device),
                 batch.sigma.to(device))


def step_file(output: Path, step: int) -> Path:
    return output / f"step-{step}.safetensors"


def save_step(output: Path, step: int, trained: dict[str, nn.Parameter], dtype: torch.dtype, config: TrainConfig) -> None:
    """Write step-N.safetensors and take away those that are more than `config.keep` behind."""
    with whole(step_file(output, step)) as part:
        save_file({saved_name(name): parameter.detach().to("cpu", dtype).contiguous() for name, parameter in trained.items()}, part,
                  metadata={"format": "pt", "l2p.step": str(step), "l2p.config": to_toml(config)})
    numbers = sorted(int(file.stem[5:]) for file in output.glob("step-*.safetensors") if file.stem[5:].isdigit())
    for number in numbers[:-config.keep] if config.keep else []:
        step_file(output, number).unlink()


def load(file: Path, trained: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """Put a saved state back and return its step. Raises CheckpointError where it can't be read."""
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        step = state["step"]
        for name, parameter in trained.items():
            parameter.data.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # whatever torch makes of a damaged file
        raise CheckpointError(f"{file} can't be read ({str(error).splitlines()[0]}). Take it away to start anew") from None
    return step


def draw_samples(pipe: L2PPipeline, encodings: Encodings, prompts: tuple[str, ...], size: tuple[int, int], steps: int, output: Path,
                 step: int) -> None:
    """Draw each prompt with its number as the seed, as one row, and all rows so far below one another."""
    drawn = [pipe(prompt_embeds=encodings[prompt], negative_prompt_embeds=encodings[""], height=size[0], width=size[1], seed=seed,
                  num_inference_steps=steps or None) for seed, prompt in enumerate(prompts)]
    folder = output / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / f"step-{step:07d}.png") as part:
        grid([drawn]).save(part, "PNG")
    files = sorted(folder.glob("step-*.png"))
    rows = []
    for number in sorted({round(place * (len(files) - 1) / (SHEET_ROWS - 1)) for place in range(SHEET_ROWS)}):
        with Image.open(files[number]) as row:
            row.thumbnail((len(prompts) * SHEET_SIDE, SHEET_SIDE))
            rows.append([row.copy()])
    with whole(output / "samples.png") as part:
        grid(rows).save(part, "PNG")


def grid(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures side by side, and rows of them below one another."""
    width = max(sum(picture.width for picture in row) for row in rows)
    sheet = Image.new("RGB", (width, sum(row[0].height for row in rows)))
    top = 0
    for row in rows:
        left = 0
        for picture in row:
            sheet.paste(picture, (left, top))
            left += picture.width
        top += row[0].height
    return sheet


class Log:
    """log.csv, a row for each step; written by one process alone."""

    def __init__(self, file: Path, writes: bool):
        self.file, self.writes, self.rows = file, writes, []
        if file.exists():
            with file.open(newline="", encoding="utf-8") as stream:
                self.rows = [Row(**{each.name: each.type(row[each.name]) for each in fields(Row)}) for row in csv.DictReader(stream)]
        self.lowest = math.inf

    def go_back_to(self, step: int) -> None:
        """Forget what came after the step that a run goes on from."""
        rows, self.rows = [row for row in self.rows if row.step <= step], []
        if self.writes:
            self.file.unlink(missing_ok=True)
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.rows) > WINDOW:
            self.lowest = min(self.lowest, self.mean())
        if not self.writes:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            if stream.tell() == 0:
                writer.writerow(each.name for each in fields(Row))
            writer.writerow(getattr(row, each.name) for each in fields(Row))

    def mean(self) -> float:
        recent = self.rows[-WINDOW:]
        return sum(row.loss for row in recent) / len(recent)

    def trouble(self) -> str | None:
        """Why training should stop; None where all is well."""
        row = self.rows[-1]
        if not (math.isfinite(row.loss) and math.isfinite(row.grad_norm)):
            return f"the loss is {row.loss} and its gradient {row.grad_norm} long"
        if self.mean() > DIVERGED * self.lowest:
            return f"the loss diverges: {self.mean():.3g} over the last {WINDOW} steps, and was {self.lowest:.3g}"
        return None


def tensorboard(folder: Path, step: int) -> "SummaryWriter | None":
    """A writer of the log for TensorBoard, where that is installed, from after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=step + 1)


class Asked:
    is_set = False


@contextmanager
def interrupts() -> Iterator[Asked]:
    """Within it the first interrupt is only noted; the second is one as usual."""
    asked = Asked()

    def note(number: int, frame: object) -> None:
        if asked.is_set:
            raise KeyboardInterrupt
        asked.is_set = True
    before = {}
    if current_thread() is main_thread():  # no other may ask for signals
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def memory(device: torch.device) -> dict[str, str]:
    """The most that a GPU held so far, for the progress bar."""
    return {"memory": f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"} if device.type == "cuda" else {}
