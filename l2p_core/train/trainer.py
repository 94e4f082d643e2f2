"""The training loop, on Hugging Face accelerate. A run is a folder:

    config.toml          every setting it was started with
    log.csv, loss.png    a row for each step, and their curve, with that of held_out.csv in red; tensorboard/ the same where
                         TensorBoard is installed
    samples/, samples.png   the same prompts drawn as training goes on, and the rows below one another
    step-N.safetensors   the trained tensors under the published names: l2p merge puts them over the checkpoint; or a LoRA
    resume.pt            where a stopped run goes on, bit for bit on a CPU
"""
import math
import pickle
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from importlib import import_module
from itertools import count
from pathlib import Path
from threading import Event, current_thread, main_thread
from time import monotonic

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..ahead import ahead
from ..checkpoint import load_model
from ..header import CheckpointError, whole
from ..layout import Layout
from ..model import L2PTransformer
from ..pipeline import L2PPipeline
from .config import TrainConfig, layers_of, read_config, to_toml
from .data import Batch, Batches, Encodings, hold_out, read_examples
from .loss import flow_matching_loss
from .memory import FrugalAdamW, quantize_frozen
from .record import Log, Row, draw_curves, samples_file, show_samples
from .shard import as_split_as, gather, is_split, reshard, shard

# What may change when a run goes on: a loss that diverged may need other steps, and the rest is not learned from.
FREE = ("steps", "learning_rate", "max_grad_norm", "batch", "save_every", "keep", "sample_every", "sample_prompts", "sample_steps",
        "device", "cache", "checkpointing", "offload_activations", "shard")  # of `batch`, `load` looks at what all processes take
PATIENCE = timedelta(hours=6)  # of processes with the one that draws samples or writes files
LORA_TARGETS = r"layers\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123]|adaLN_modulation\.0)"


def train(config: TrainConfig, progress: bool = True) -> Path:
    """Train, or go on where the run in `config.output` stopped. Returns the last step file.

    An interrupt is answered at the end of the step, when all is saved. Raises ValueError for settings and data that do not
    fit, before anything is trained, and where the loss diverges; CheckpointError for files."""
    return find_recipe(config.recipe)(config, progress).train()


def find_recipe(name: str) -> type["Run"]:
    """The class that "module:Class" names, and `Run` by itself for "". Raises ValueError."""
    if not name:
        return Run
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"recipe is {name!r}, which can't be had ({error}); expected module:Class") from None
    if not (isinstance(found, type) and issubclass(found, Run)):
        raise ValueError(f"recipe is {name!r}, which is no subclass of {__name__}.Run")
    return found


class Run:
    """A run set up: model, data, optimizer and folder, at the step where it goes on.

    A recipe is a subclass. It may make its files before anything is read (`__init__`), and replace what a step learns from
    (`batch`), by (`loss`) and with (`make_optimizer`), and what is drawn on the way (`draw`); see shapes/train.py."""

    def __init__(self, config: TrainConfig, progress: bool):
        try:
            from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
        except ImportError:
            raise ImportError("training needs accelerate: pip install 'comfyui-l2p[train]'") from None
        self.config, self.output, self.dtype = config, Path(config.output), compute_dtype(config)
        self.accelerator = Accelerator(mixed_precision="no", cpu=config.device == "cpu",  # `autocast` sees to the former
                                       kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                                                        InitProcessGroupKwargs(timeout=PATIENCE)])
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if config.step_in_backward and self.accelerator.num_processes > 1:
            raise ValueError(f"step_in_backward is for one process, and here are {self.accelerator.num_processes}; leave it off")
        if config.shard and self.accelerator.num_processes == 1:
            raise ValueError(f"shard is {config.shard}, and there is one process; start several by accelerate launch, or leave it off")
        if self.accelerator.distributed_type in ("FSDP", "DEEPSPEED"):
            raise ValueError(f"accelerate is set up for {self.accelerator.distributed_type.value}; set it up for several processes alone, "
                             "and split the model by shard")
        self.progress = progress and self.main
        check_run(self.output, config)
        self.pipe = L2PPipeline.from_pretrained(config.checkpoint, config.text_encoder or None, config.tokenizer or None,
                                                self.device, self.dtype, progress=self.progress, offload=False)
        layout = self.pipe.layout
        refuse_quantized(layout)
        if config.height:
            self.pipe.check_size(config.height, config.width)
            layout.metadata["modelspec.resolution"] = f"{config.width}x{config.height}"  # what it draws best from now on
        if config.size_step % (multiple := layout.config.size_multiple):
            raise ValueError(f"size_step is {config.size_step}; this checkpoint draws multiples of {multiple} pixels, so give one")
        examples = read_examples(Path(config.data), config.height and (config.height, config.width) or None,
                                 config.max_pixels or math.prod(layout.trained_size), config.size_step or multiple, self.progress)
        learned, held_out = hold_out(examples, config.held_out, config.seed)
        self.sample_size = Counter(example.size for example in examples).most_common(1)[0][0]
        self.prompts = config.sample_prompts or tuple(dict.fromkeys(example.captions[0] for example in examples))[:4]
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        self.encodings = Encodings(Path(config.cache or Path(config.data) / "encodings"), self.pipe)
        captions = list(dict.fromkeys(["", *self.prompts, *(caption for example in examples for caption in example.captions)]))
        self.encodings.add(captions[rank::processes], self.progress)
        self.accelerator.wait_for_everyone()
        if not all(self.encodings.file(caption).exists() for caption in captions):
            raise ValueError(f"{self.encodings.folder} lacks captions that other processes encoded; give a cache that all machines share")
        self.batches = Batches(learned, self.encodings, config, layout.config.patch_size, processes, rank)
        self.held_out = held_out and Batches(held_out, self.encodings, replace(config, caption_dropout=0.0, batch=1), layout.config.patch_size)

        if config.shard or config.quantize_frozen:  # the device gets its part of each block, or linears one at a time
            self.pipe.transformer = load_model(layout, "cpu", self.dtype)
        self.trained = prepare(self.pipe.transformer, config, None if config.shard else self.device)
        if config.shard:
            shard(self.pipe.transformer, self.device, weights=config.shard == "all")
            self.trained = trained_of(self.pipe.transformer)
        self.ema = {name: parameter.detach().float().clone() for name, parameter in self.trained.items()} if config.ema else {}
        self.saved_tensors = self.trained | {f"ema.{name}": tensor for name, tensor in self.ema.items()}
        optimizer = self.make_optimizer()
        resume = self.output / "resume.pt"
        self.step = self.saved = load(resume, self.saved_tensors, optimizer, self.batches.size) if resume.exists() else 0
        if len(set(self.accelerator.gather(torch.tensor([self.step], device=self.device)).tolist())) > 1:
            raise ValueError(f"not all processes find the run in {self.output}, or not the same; give a folder that all machines share")
        self.model, self.optimizer = self.pipe.transformer, self.accelerator.prepare(optimizer, device_placement=[False])
        if not config.shard:
            self.model = self.accelerator.prepare(self.model)
        self.log = Log(self.output, self.step, self.main)
        if self.main:
            with whole(self.output / "config.toml") as part:
                part.write_text(to_toml(config), encoding="utf-8")

    def make_optimizer(self) -> torch.optim.Optimizer:
        """For `trained`, and for what else the loss trains: that goes into `saved_tensors`, by name, to be there when a run goes on."""
        return make_optimizer(self.trained, self.config)

    def batch(self, number: int) -> Batch:
        """Called in a thread of its own, while the batch before is trained on. It must follow from the number alone."""
        return self.batches[number]

    def loss(self, batch: Batch) -> Tensor:
        """What the gradient is taken of."""
        return flow_matching_loss(self.model, batch.pictures, batch.captions, batch.noise, batch.sigma)

    def train(self) -> Path:
        """Step after step to the end, with samples and saves on the way."""
        config = self.config
        draws = bool(config.sample_every and (self.main or config.shard))  # a split model draws in all processes
        if config.sample_every and self.step % config.sample_every == 0 and not (self.step and samples_file(self.output, self.step).exists()):
            self.look(draws)  # which a stop may have left out
        due = False
        with (closing(ahead(map(self.batch, count(self.step * config.accumulate)))) as batches, self.log, interrupts() as interrupted,
              tqdm(total=config.steps, initial=self.step, unit="step", disable=not self.progress) as bar):
            while self.step < config.steps:
                asked = self.learn(batches, interrupted)
                bar.update()
                bar.set_postfix({"loss": f"{self.log.mean():.4f}", **memory(self.device)})
                if config.sample_every and self.step % config.sample_every == 0 and not asked:
                    self.look(draws)
                due = due or self.step % config.save_every == 0
                if due and self.log.steady() or self.step == config.steps or asked:
                    self.save()
                    due = False
                if asked:
                    self.leave()
                    raise KeyboardInterrupt
        self.leave()
        return step_file(self.output, self.step)

    def leave(self) -> None:
        """All processes together: a launcher ends those that are behind the first."""
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()

    def look(self, draws: bool) -> None:
        """How far it is: the loss of what is held out and, where this process draws, samples."""
        if self.held_out:
            pictures, processes, total = self.held_out.per_epoch, self.accelerator.num_processes, torch.zeros((), device=self.device)
            with torch.no_grad(), self.drawing():
                for first in range(0, pictures, processes):  # all processes run the model as often
                    number = first + self.accelerator.process_index
                    loss = self.loss(on_device(self.held_out[number % pictures], self.device))
                    total += loss if number < pictures else 0
            self.log.add_held_out(self.step, self.accelerator.reduce(total, "sum").item() / pictures)
        if draws:
            self.draw()

    def learn(self, batches: Iterator[Batch], interrupted: Event) -> bool:
        """One step of the optimizer. Returns whether any process was interrupted by now.

        Raises ValueError, and nothing of the step is saved, where the loss is not what one goes on with."""
        began, config = monotonic(), self.config
        rate = config.learning_rate * rate_at(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1)
        loss = torch.zeros((), device=self.device)
        for part in range(config.accumulate):
            batch = on_device(next(batches), self.device)
            with nullcontext() if part == config.accumulate - 1 else self.accelerator.no_sync(self.model):
                with self.autocast(), save_on_cpu(self.device.type == "cuda") if config.offload_activations else nullcontext():
                    part_loss = self.loss(batch)
                self.accelerator.backward(part_loss / config.accumulate)
            loss += part_loss.detach() / config.accumulate
        if config.step_in_backward:
            norm = self.optimizer.optimizer.norm()
        else:
            norm = self.accelerator.clip_grad_norm_(self.trained.values(), config.max_grad_norm or math.inf)
        asked, loss = self.accelerator.reduce(torch.stack([loss.new_tensor(float(interrupted.is_set())), loss]), "mean").tolist()
        self.log.add(Row(self.step + 1, loss, rate, float(gather(norm, True)), monotonic() - began))
        if why := self.log.trouble():
            raise ValueError(f"{why} at step {self.step + 1}, so training stopped. The last good state is step {self.saved}, in "
                             f"{self.output}; take a lower learning_rate than {config.learning_rate:g}, or look at the data of the "
                             "last steps")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        for name, mean in self.ema.items():
            mean.lerp_(self.trained[name].detach().float(), 1 - min(config.ema, self.step / (9 + self.step)))
        return asked > 0

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision == "bf16")

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it the pipeline draws as step files would."""
        with self.autocast(), swapped_weights(self.trained, self.ema):
            yield
            reshard(self.model)

    def save(self) -> None:
        """The step file, and the state to go on from."""
        state = {"step": self.step, "size": self.batches.size, "tensors": gather(self.saved_tensors, self.main),
                 "optimizer": gather(self.optimizer.state_dict(), self.main)}
        if self.main:
            learned = {name: state["tensors"][f"ema.{name}" if self.ema else name] for name in self.trained}
            save_step(self.output, self.step, learned, self.dtype, self.config, self.pipe.layout.trained_size)
            with whole(self.output / "resume.pt") as part:
                torch.save(state, part)
            draw_curves([[(row.step, row.loss) for row in self.log.rows], self.log.held_out], self.output / "loss.png")
        self.saved = self.step

    def draw(self) -> None:
        """A row of samples: each prompt with its number as the seed."""
        height, width = self.sample_size
        with self.drawing():
            drawn = [self.pipe(prompt_embeds=self.encodings[prompt], negative_prompt_embeds=self.encodings[""], height=height, width=width,
                               seed=seed, num_inference_steps=self.config.sample_steps or None) for seed, prompt in enumerate(self.prompts)]
        if self.main:
            show_samples(drawn, self.output, self.step)


def compute_dtype(config: TrainConfig) -> torch.dtype:
    """What is computed in, and what frozen weights and step files are stored in."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def check_run(output: Path, config: TrainConfig) -> None:
    """Raises ValueError where the folder holds a run with settings that would teach something else."""
    if not (output / "config.toml").exists():
        if (output / "resume.pt").exists() or output.is_file():
            raise ValueError(f"{output} holds something else than a run; give another output")
        return
    if not (output / "resume.pt").exists():  # nothing is learned yet
        return
    before = read_config(output / "config.toml", {})
    for each in fields(TrainConfig):
        if each.name not in (*FREE, "output") and (was := getattr(before, each.name)) != (now := getattr(config, each.name)):
            raise ValueError(f"{output} holds a run with {each.name} {was!r}, now {now!r}; give another output, or go on as it was")


def refuse_quantized(layout: Layout) -> None:
    """Raises CheckpointError."""
    if layout.quantization:
        raise CheckpointError(f"{layout.path.name} is quantized ({layout.quantization}); train the BF16 or FP32 model")


def prepare(model: L2PTransformer, config: TrainConfig, device: torch.device | None = None) -> dict[str, nn.Parameter]:
    """Freeze what stays, put the rest into what it is trained in, and return it by name.

    device: to put it on, of what is quantized each linear by itself; None leaves all where it is."""
    model.train()
    frozen = model.layers if config.lora_rank else model.layers[layers_of(config.freeze)]
    frozen.requires_grad_(False)
    if config.quantize_frozen:
        quantize_frozen(frozen, config.quantize_frozen, device)
    if config.lora_rank:
        add_lora(model, config)
    trained = trained_of(model)
    for parameter in trained.values():
        dtype = torch.bfloat16 if config.stochastic_rounding else torch.float32
        parameter.data = parameter.data.to(device, dtype, copy=True)  # the file it is mapped from is not written to
    if device:
        model.to(device)
    if config.checkpointing:
        for part in (*model.noise_refiner, *model.context_refiner, *model.layers, model.local_decoder):
            part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
    return trained


def trained_of(model: L2PTransformer) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


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


def make_optimizer(trained: dict[str, nn.Parameter], config: TrainConfig, host: str = "cpu") -> torch.optim.Optimizer:
    """The published one, or the same in less memory; host: where it may keep its state."""
    settings = {"lr": config.learning_rate, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw" and not (config.offload_state or config.stochastic_rounding or config.step_in_backward):
        on_gpu = any(parameter.is_cuda for parameter in trained.values())
        return torch.optim.AdamW(trained.values(), fused=on_gpu or None, **settings)  # else it holds a copy of all weights there
    return FrugalAdamW(trained.values(), config, host, **settings)


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
    return replace(batch, pictures=batch.pictures.to(device), captions=[caption.to(device) for caption in batch.captions],
                   noise=batch.noise.to(device), sigma=batch.sigma.to(device))


def step_file(output: Path, step: int) -> Path:
    return output / f"step-{step}.safetensors"


def save_step(output: Path, step: int, trained: dict[str, nn.Parameter], dtype: torch.dtype, config: TrainConfig,
              size: tuple[int, int]) -> None:
    """Write step-N.safetensors and take away those before it that are more than `config.keep` behind."""
    with whole(step_file(output, step)) as part:
        save_file({saved_name(name): parameter.detach().to("cpu", dtype).contiguous() for name, parameter in trained.items()}, part,
                  metadata={"format": "pt", "l2p.step": str(step), "l2p.config": to_toml(config),
                            "modelspec.resolution": f"{size[1]}x{size[0]}"})
    numbers = sorted(int(file.stem[5:]) for file in output.glob("step-*.safetensors") if file.stem[5:].isdigit())
    for number in [number for number in numbers if number <= step][:-config.keep] if config.keep else []:
        step_file(output, number).unlink()


def load(file: Path, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, size: int) -> int:
    """Put a saved state back and return its step; size: pictures that all processes together take at once.

    Raises CheckpointError where the file can't be read, ValueError where it is of another run."""
    elsewhere = any(is_split(tensor) or tensor.device.type != "cpu" for tensor in tensors.values())
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=elsewhere)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:  # what torch makes of a damaged file
        raise CheckpointError(f"{file} can't be read ({str(error).splitlines()[0]}). Take it and the step files away to start anew") from None
    if state.get("size", size) != size:
        raise ValueError(f"{file} is of a run that takes {state['size']} pictures at once, now {size}; give a batch that is, "
                         f"over all processes, {state['size']}")
    if missing := [name for name in tensors if name not in state["tensors"]]:
        raise ValueError(f"{file} lacks {len(missing)} of {len(tensors)} trained tensors (first: {missing[0]}): it was saved by another "
                         "recipe, or version of this program. Give another output")
    for name, tensor in tensors.items():
        tensor.data.copy_(as_split_as(tensor, state["tensors"][name]))
    state["optimizer"] = tree_map(lambda value: value.clone() if isinstance(value, Tensor) and value.dim() == 0 else value,
                                  state["optimizer"])  # optimizers take counts as they are, and each would keep the file open
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, its in state["optimizer"].get("state", {}).items():  # split before the optimizer takes them to the device
        its.update({name: as_split_as(parameters[number], value) for name, value in its.items()})
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


@contextmanager
def swapped_weights(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Within it the parameters have these values, as far as there are some."""
    def put(parameter: nn.Parameter, value: Tensor) -> None:
        if is_split(parameter):  # the place is known elsewhere
            parameter.data.copy_(value)
        else:
            parameter.data = value.to(parameter.dtype)
    before = {name: parameters[name].data.clone() if is_split(parameters[name]) else parameters[name].data for name in values}
    try:
        for name, value in values.items():
            put(parameters[name], value)
        yield
    finally:
        for name, value in before.items():
            put(parameters[name], value)


@contextmanager
def interrupts() -> Iterator[Event]:
    """Within it the first interrupt is only noted; the second is one as usual. A polite stop is noted, however often: a launcher
    sends its own after that of the keyboard."""
    asked = Event()

    def note(number: int, frame: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
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
