"""Every setting of a training run: its default and what it changes. A TOML file gives them, flags
override it."""

import difflib
import json
import math
import sys
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..settings import MAX_BATCH, MAX_COUNT, MAX_SIDE, checked_text
from ..tables import read_text
from .presets import preset

# Recipes of this program itself, which a settings file may name: they are no code of others.
OWN_RECIPES = (
    "comfyui_l2p.l2p_core.shapes.train:ShapesRun",
    "comfyui_l2p.l2p_core.shapes.train:ScoredRun",
    "comfyui_l2p.l2p_core.shapes.recipe:LayoutRun",
    "comfyui_l2p.l2p_core.shapes.recipe:WholeRun",
    "comfyui_l2p.l2p_core.shapes.recipe:FreeLayoutRun",
    "comfyui_l2p.l2p_core.shapes.recipe:FreeWholeRun",
)


LORA_TARGETS = ("attention", "feed_forward", "adaLN")
HIGHEST = 10**9  # of numbers that have no bound of their own


Config = TypeVar("Config", bound="TrainConfig")


def knob(default: object, says: str, **about: object) -> Any:
    """A field with its default and its help; for a type checker a value of any type, as
    `dataclasses.field` is.

    choices: the values it may have. high: the largest number, by default `HIGHEST`."""
    return field(default=default, metadata={"help": says, **about})


@dataclass(frozen=True)
class TrainConfig:
    """What `train` takes. Paths are as given, from the folder the program runs in."""

    REQUIRED: ClassVar = ("checkpoint", "data", "output")
    POSITIVE: ClassVar[tuple[str, ...]] = (
        "steps",
        "batch",
        "accumulate",
        "save_every",
        "shift",
        "learning_rate",
    )

    checkpoint: str = knob(
        "", "the pixel initialisation (l2p convert), or any whole L2P model, to train from"
    )
    data: tuple[str, ...] = knob(
        (),
        "folders of images, each with metadata.csv or metadata.jsonl, or with a caption in a .txt"
        " beside each image; or data sets of Hugging Face, as hf://OWNER/NAME or folders."
        " FOLDER:10 uses the images of this folder 10 times per epoch",
    )
    output: str = knob(
        "", "the run's folder: configuration, log, samples, step-N.safetensors, resume.pt"
    )
    caption_column: str = knob(
        "",
        ("name of the metadata column that holds the captions (default: text, prompt or caption)"),
    )
    trigger: str = knob(
        "",
        "a word that every caption gets. It replaces [trigger]; a caption without [trigger] gets"
        " it at its start, unless it already contains the word. An image without a caption gets"
        " the word as its caption",
    )
    masked_loss: bool = knob(
        False,
        "train on the white part of each image's mask. The mask is NAME-masklabel.png beside the"
        " image, the file of the same name in masks/, or the file in the metadata column mask",
    )
    unmasked_weight: float = knob(
        0.0, "with masked_loss: weight of the black part; white has weight 1"
    )
    regularization: tuple[str, ...] = knob(
        (),
        "folders of regularization images, which show the class without the trained subject;"
        " their captions get no trigger word. They are repeated until there are as many as"
        " training images",
    )
    regularization_weight: float = knob(1.0, "weight of the loss of regularization images")
    text_encoder: str = knob(
        "",
        "text encoder, as for l2p generate; it encodes captions that are not in the cache yet,"
        " and is then freed",
    )
    tokenizer: str = knob("", "folder of the tokenizer, as for l2p generate")
    cache: str = knob("", "folder for encoded captions (default: encodings/ in the data folder)")

    steps: int = knob(10_000, "total number of optimizer steps")
    batch: int = knob(1, "images per process and pass", high=MAX_BATCH)
    accumulate: int = knob(1, "batches per step: their gradients are averaged")
    height: int = knob(
        0,
        "height in pixels; with width, all images are resized and cropped to this size. 0: each"
        " image keeps its shape",
        high=MAX_SIDE,
    )
    width: int = knob(0, "width in pixels; see height", high=MAX_SIDE)
    max_pixels: int = knob(
        0,
        "larger images are resized to this many pixels (default: the checkpoint's trained"
        " resolution)",
        high=MAX_SIDE**2,
    )
    resolutions: tuple[int, ...] = knob(
        (),
        "sides of squares, such as 512 768 1024: every image is trained at the area of each square"
        " that it is large enough for; replaces max_pixels",
        high=MAX_SIDE,
    )
    size_step: int = knob(
        0,
        "sides of images that keep their shape are multiples of this many pixels (default: the"
        " patch, as published)",
        high=MAX_SIDE,
    )
    buckets: str = knob(
        "auto",
        "sizes of training images. own: each image keeps its shape, as published; fixed: 13"
        " shapes near the trained area, so that batches hold one size; auto: fixed if a step takes"
        " several images and neither size_step nor height is given, else own",
        choices=("auto", "own", "fixed"),
    )
    background: str = knob(
        "white", "colour behind the transparent parts of images: a name, or #rrggbb"
    )
    seed: int = knob(
        0,
        "seed of the order of images, of the sigmas and of noise that is not paired",
        high=2**64 - 1,
    )

    freeze: str = knob("5:-5", "main layers to freeze, as a Python slice; '' trains everything")
    recipe: str = knob(
        "",
        "module:Class, a subclass of train.run.Run that trains in another way; the module is in"
        " an installed package or the current folder. A recipe is code, so it must be given by"
        " this flag; a TOML file may name only the recipes of the small model",
    )
    lora_rank: int = knob(
        0,
        "train a LoRA of this rank on the attention, feed-forward and adaLN of the main layers;"
        " the model's own weights stay frozen. 0: train the weights themselves",
    )
    lora_alpha: float = knob(0.0, "scale the LoRA by lora_alpha / lora_rank; 0: no scaling")
    lora_targets: tuple[str, ...] = knob(
        LORA_TARGETS,
        "linears of the main layers that get a LoRA (default: attention feed_forward adaLN)",
    )
    lora_kind: str = knob(
        "lora",
        "kind of the LoRA. dora also trains the norm of each row (arXiv 2402.09353), which helps"
        " low ranks; lokr trains a Kronecker product (LyCORIS), for smaller files",
        choices=("lora", "dora", "lokr"),
    )
    resume_lora: str = knob(
        "",
        "a LoRA file to start from, with any tensor names that l2p generate supports; its rank is"
        " lora_rank. Layers that it lacks are initialised",
    )
    noise: str = knob(
        "auto",
        "noise of training. paired: each image always gets the noise of its own seed, as"
        " published at 1K; random: new noise each time; auto: paired at patch 16 if the data has"
        " seeds, else random",
        choices=("auto", "paired", "random"),
    )
    timestep_sampling: str = knob(
        "grid",
        "how sigmas are sampled. grid: uniformly from the published schedule (500 steps at patch"
        " 16, 1000 steps above); uniform: uniformly between 0 and 1, for details; logit-normal:"
        " mostly in the middle and hardly any near the ends (Stable Diffusion 3); mode: mostly in"
        " the middle and some near the ends; shifted: as grid, but continuous",
        choices=("grid", "uniform", "logit-normal", "mode", "shifted"),
    )
    shift: float = knob(
        3.0,
        ("shift of the sigmas of grid and shifted; a value above 3 puts more weight on the layout"),
    )
    loss_weighting: str = knob(
        "none",
        "weight of the loss, depending on sigma. min-snr: less weight near pure noise, where"
        " training cannot remove the error; cosmap: twice the weight in the middle (Stable"
        " Diffusion 3)",
        choices=("none", "min-snr", "cosmap"),
    )
    caption_dropout: float = knob(
        0.0,
        "share of captions that are replaced by the empty prompt; guidance needs the empty"
        " prompt. 0 as published",
    )

    learning_rate: float = knob(5e-5, "learning rate of AdamW (betas 0.9 and 0.999, epsilon 1e-8)")
    weight_decay: float = knob(0.01, "weight decay of every parameter, as published")
    schedule: str = knob(
        "published",
        "learning-rate schedule. published: a third of the rate for the first five steps, then"
        " constant; constant; linear and cosine: decay to 0",
        choices=("published", "constant", "linear", "cosine"),
    )
    warmup: int = knob(
        0, ("number of warm-up steps, in which the rate rises from 0; not with schedule published")
    )
    max_grad_norm: float = knob(0.0, "clip gradients to this norm; 0: no clipping, as published")
    ema: float = knob(
        0.0,
        "samples and step files use an EMA of the trained weights with this decay per step (0.999"
        " is usual; the decay is lower in the first steps). 0: the weights themselves, as"
        " published",
    )
    mixed_precision: str = knob(
        "bf16",
        "precision of training. bf16: trained weights in float32, computation and frozen layers"
        " in bfloat16; no: everything in float32",
        choices=("bf16", "no"),
    )
    checkpointing: bool = knob(
        True,
        "gradient checkpointing of the blocks and the decoder: a step takes a third longer, in a"
        " fraction of the memory",
    )
    offload_activations: bool = knob(False, "offload saved activations to the CPU")
    quantize_frozen: str = knob(
        "",
        "quantize the linears of frozen layers to int8, or to nf4, which takes half the memory and"
        " is coarser; '' leaves them as they are",
        choices=("", "int8", "nf4"),
    )
    swap_blocks: float = knob(
        0.0,
        "share of the frozen main layers whose linears are offloaded to the CPU; each is copied to"
        " the GPU three times a step",
    )
    compile_blocks: bool = knob(
        False, "compile each block (torch.compile): steps are faster after the first minutes"
    )
    optimizer: str = knob(
        "adamw",
        "the optimizer. adamw8bit keeps its state in 8 bits (bitsandbytes); adafactor keeps"
        " almost no state; muon orthogonalises the updates of the blocks' matrices (torch 2.9);"
        " prodigy finds the learning rate and multiplies it by learning_rate (prodigyopt)",
        choices=("adamw", "adamw8bit", "adafactor", "muon", "prodigy"),
    )
    offload_state: bool = knob(False, "keep and update the optimizer's state on the CPU")
    stochastic_rounding: bool = knob(
        False,
        "keep trained weights in bfloat16, and round each update stochastically",
    )
    step_in_backward: bool = knob(
        False,
        "update each tensor as soon as its gradient is computed, then free the gradient; works"
        " only with one process, accumulate 1 and no max_grad_norm",
    )
    shard: str = knob(
        "",
        "what is sharded over the processes. state: the gradients and the optimizer's state"
        " (ZeRO-2); all: the weights too (ZeRO-3); '': nothing, each process holds everything",
        choices=("", "state", "all"),
    )
    device: str = knob(
        "",
        "device to train on (default: the GPU, if there is one; CUDA_VISIBLE_DEVICES selects it)."
        " cpu: train on the CPU"
        "",
        choices=("", "cpu"),
    )

    save_every: int = knob(500, "number of steps between two files step-N.safetensors")
    keep: int = knob(3, "number of step files to keep, the newest ones; 0 keeps all")
    sample_every: int = knob(
        500, ("number of steps between two rows of samples; 0 generates no samples")
    )
    sample_prompts: tuple[str, ...] = knob(
        (),
        "prompts of the samples, which have the same noise each time (default: the first four"
        " captions)",
    )
    sample_file: str = knob(
        "",
        "a prompt file of samples, as for l2p generate --prompts; its columns, such as height,"
        " width, seed and cfg_scale, apply to their row",
    )
    sample_steps: int = knob(
        0,
        ("number of steps with which samples are generated (default: that of the checkpoint)"),
        high=1000,
    )
    wandb_project: str = knob(
        "", "also log losses, samples and settings to this project of Weights & Biases"
    )
    held_out: int = knob(
        0,
        "number of images in the validation set, chosen by the seed. Every sample_every steps the"
        " validation loss, at fixed noise and sigmas, is written to held_out.csv and loss.png",
    )

    def max_area(self, trained: int) -> int:
        """Return the largest number of pixels of an image. trained: that of the trained
        resolution."""
        return max((side**2 for side in self.resolutions), default=self.max_pixels or trained)

    def __post_init__(self) -> None:
        """Raises ValueError, naming the knob, for values that make no sense together or alone."""
        if isinstance(self.data, str):  # one folder
            object.__setattr__(self, "data", (self.data,) if self.data else ())
        for name in self.REQUIRED:
            if not getattr(self, name):
                raise ValueError(
                    f"{name} is not given; give {self.__dataclass_fields__[name].metadata['help']}"
                )
        for each in fields(self):
            value, choices = getattr(self, each.name), each.metadata.get("choices")
            if each.name == "mixed_precision" and value in ("fp16", "float16"):
                raise ValueError(
                    f"mixed_precision is {value!r}, and float16 overflows in this model's training;"
                    " expected bf16, or no (float32) for a card without bfloat16"
                )
            if choices and value not in choices:
                raise ValueError(f"{each.name} is {value!r}; expected one of {', '.join(choices)}")
            if each.type in (int, float):
                high = each.metadata.get("high", HIGHEST)
                if not 0 <= value < math.inf:
                    raise ValueError(f"{each.name} is {value}; expected 0 or more")
                if value > high:
                    raise ValueError(f"{each.name} is {value}; expected at most {high}")
        for name in self.POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected more than 0")
        if (self.height == 0) != (self.width == 0):
            raise ValueError(
                f"height is {self.height} and width {self.width}; give both, or neither"
            )
        if self.height and self.size_step:
            raise ValueError(
                f"size_step is {self.size_step}, and all images become {self.width} x"
                f" {self.height}; give one or the other"
            )
        if self.warmup and self.schedule == "published":
            raise ValueError(
                f"warmup is {self.warmup}, and schedule published has its own; take constant,"
                " linear or cosine, or leave it off"
            )
        for name in ("quantize_frozen", "swap_blocks"):
            if getattr(self, name) and not (self.freeze or self.lora_rank):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, and freeze '' leaves nothing frozen;"
                    " leave it off"
                )
        if wrong := [name for name in self.lora_targets if name not in LORA_TARGETS]:
            raise ValueError(
                f"lora_targets has {wrong[0]!r}; expected some of {', '.join(LORA_TARGETS)}"
            )
        if self.lora_rank and not self.lora_targets:
            raise ValueError("lora_targets is empty, so nothing is trained; name some or leave it")
        if self.lora_kind == "dora" and (self.quantize_frozen or self.swap_blocks):
            raise ValueError(
                "lora_kind is dora, which reads the frozen weights themselves, and quantize_frozen"
                f" is {self.quantize_frozen!r}, swap_blocks {self.swap_blocks:g}; leave those off,"
                " or take lora or lokr"
            )
        if self.lora_kind != "lora" and self.resume_lora:
            raise ValueError(
                f"resume_lora is {self.resume_lora}, and lora_kind {self.lora_kind} starts from no"
                " LoRA; take lora_kind lora"
            )
        if self.optimizer in ("muon", "prodigy"):
            for name in ("offload_state", "stochastic_rounding", "step_in_backward"):
                if getattr(self, name):
                    raise ValueError(
                        f"optimizer is {self.optimizer}, which updates float32 weights all at once,"
                        f" and {name} is set; leave it off, or take adafactor or adamw"
                    )
        if self.optimizer == "prodigy" and self.learning_rate < 0.01:
            raise ValueError(
                f"learning_rate is {self.learning_rate:g}, and prodigy multiplies it by the rate"
                " that it finds; give 1"
            )
        if self.sample_file and self.sample_prompts:
            raise ValueError(
                f"sample_prompts and sample_file {self.sample_file} are both given; put the prompts"
                " into the file, or leave one out"
            )
        if self.resume_lora and not self.lora_rank:
            raise ValueError(
                f"resume_lora is {self.resume_lora}, and lora_rank 0 trains no LoRA; give the rank"
                " of that file as lora_rank"
            )
        for side in self.resolutions:
            if not 16 <= side <= MAX_SIDE:
                raise ValueError(f"resolutions has {side}; expected sides from 16 to {MAX_SIDE}")
        if self.resolutions and (self.height or self.max_pixels):
            raise ValueError(
                "resolutions sets the areas of images; leave out height, width and max_pixels"
            )
        if self.buckets == "fixed" and (self.height or self.size_step):
            raise ValueError(
                "buckets is fixed, which sets the sizes; leave out height, width and size_step"
            )
        for name in ("caption_dropout", "ema", "unmasked_weight", "swap_blocks"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1")
        if self.step_in_backward and (self.accumulate > 1 or self.max_grad_norm):
            raise ValueError(
                "step_in_backward never has all gradients at once, so it goes neither with"
                f" accumulate {self.accumulate} nor with max_grad_norm {self.max_grad_norm:g}; take"
                " 1 and 0, or leave it off"
            )
        if self.stochastic_rounding and self.mixed_precision != "bf16":
            raise ValueError(
                "stochastic_rounding keeps weights in bfloat16, mixed_precision 'no' all in"
                " float32; choose one"
            )
        if self.held_out and not self.sample_every:
            raise ValueError(
                f"held_out is {self.held_out}, and the validation loss is measured every"
                " sample_every steps, which is 0; give both, or neither"
            )
        if self.shard:
            for name in (
                "lora_rank",
                "quantize_frozen",
                "swap_blocks",
                "offload_state",
                "stochastic_rounding",
                "step_in_backward",
            ):
                if getattr(self, name):
                    raise ValueError(
                        f"shard goes with plain AdamW on the model's own weights, and {name} is"
                        f" {getattr(self, name)!r}; choose one"
                    )
            if self.optimizer != "adamw":
                raise ValueError(
                    f"shard goes with plain AdamW, and optimizer is {self.optimizer!r}; choose one"
                )
        layers_of(self.freeze)
        check_colour(self.background)


@dataclass(frozen=True)
class SynthesizeConfig:
    """How `synthesize` generates; the defaults are Z-Image-Turbo's own settings."""

    count: int = knob(2, "images for each prompt", high=MAX_COUNT)
    seed: int = knob(0, "seed of the first image; each further image adds 1", high=2**63)
    height: int = knob(1024, "pixels", high=MAX_SIDE)
    width: int = knob(1024, "pixels", high=MAX_SIDE)
    steps: int = knob(9, "steps of the latent model", high=1000)
    guidance: float = knob(0.0, "guidance scale of the latent model; 0 for none", high=100)

    def __post_init__(self) -> None:
        if (
            min(self.count, self.steps, self.height, self.width) < 1
            or self.height % 16
            or self.width % 16
            or self.seed < 0
        ):
            raise ValueError(
                f"count {self.count}, steps {self.steps}, height {self.height}, width {self.width},"
                f" seed {self.seed}: expected 1 or more, sizes in multiples of 16, and a seed of 0"
                " or more"
            )
        for each in fields(self):
            value, high = getattr(self, each.name), each.metadata["high"]
            if not value <= high:
                raise ValueError(f"{each.name} is {value}; expected at most {high}")


def check_colour(name: str) -> None:
    """Raise ValueError for what is no colour."""
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise ValueError(
            f"background is {name!r}; expected a colour such as white, grey or #808080"
        ) from None


def layers_of(text: str) -> slice:
    """ "5:-5" → slice(5, -5), and "" → slice(0, 0), none. Raises ValueError."""
    try:
        start, stop = (int(part) if part.strip() else None for part in (text or "0:0").split(":"))
    except ValueError:
        raise ValueError(
            f"freeze is {text!r}; expected a slice of the main layers such as '5:-5', or '' for"
            " none"
        ) from None
    return slice(start, stop)


def read_config(
    file: Path | None, overrides: dict[str, object], of_run: bool = False
) -> TrainConfig:
    """The settings of `train`, see `read_config_of`."""
    return read_config_of(TrainConfig, file, overrides, of_run)


def read_config_of(
    kind: type[Config], file: Path | None, overrides: dict[str, object], of_run: bool = False
) -> Config:
    """The file's values with the overrides over them. Raises ValueError for what is no TOML, no
    knob or of another type.

    "memory" in either names a preset (`presets.py`), whose settings give way to those that are
    given. A recipe is code, and a TOML file may come from anyone. So one in the file is rejected
    unless the overrides name a recipe too, or it is the program's own. of_run: the file is a run's
    record, of which nothing is run."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        values = {} if file is None else tomllib.loads(read_text(file))
    except (
        ValueError,
        RecursionError,
    ) as error:  # of tomllib, of UTF-8, of numbers with thousands of digits
        raise ValueError(f"{file} is no TOML: {error}") from None
    known = {each.name: each for each in fields(kind)}
    memory = {**values, **overrides}.get("memory", "")
    values, overrides = (
        {name: value for name, value in each.items() if name != "memory"}
        for each in (values, overrides)
    )
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(
                f"{file}: there is no setting {name}"
                + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}")
            )
    recipe = values.get("recipe")
    if recipe and recipe not in OWN_RECIPES and "recipe" not in overrides and not of_run:
        raise ValueError(
            f"{file} names the recipe {recipe!r}, which is Python code, and a settings file must"
            " not run code. Read that code first; if you trust it, name it yourself: --recipe"
            f" {recipe}"
        )
    given = {name: cast(known[name], value) for name, value in {**values, **overrides}.items()}
    if not memory:
        return kind(**given)
    chosen = {name: value for name, value in preset(memory, given).items() if name not in given}
    try:
        return kind(**{**chosen, **given})
    except ValueError as error:
        told = ", ".join(f"{name} {value!r}" for name, value in chosen.items())
        raise ValueError(f"{error} (memory {memory} chose {told})") from None


def cast(setting: Field, value: object) -> Any:
    """A value from TOML as the setting's type. Raises ValueError where it is of another."""
    if setting.name == "data" and isinstance(value, str):
        return (checked_text(setting.name, value),) if value else ()
    if setting.type is str and isinstance(value, str):
        return checked_text(setting.name, value)
    if setting.type is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if (
        setting.type == tuple[str, ...]
        and isinstance(value, (list, tuple))
        and all(isinstance(each, str) for each in value)
    ):
        return tuple(checked_text(setting.name, each) for each in value)
    if setting.type is float and type(value) is int and abs(value) <= 2**64:
        return float(value)
    if setting.type == tuple[int, ...] and isinstance(value, (list, tuple)):
        if all(type(each) is int for each in value):
            return tuple(value)
    if type(value) is not setting.type:
        expected: dict[object, str] = {
            str: "text in quotes",
            int: "a whole number",
            float: "a number",
            bool: "true or false",
        }
        lists = "a list of whole numbers" if setting.type == tuple[int, ...] else "a list of texts"
        raise ValueError(
            f"{setting.name} is {value!r}; expected {expected.get(setting.type, lists)}"
        )
    return value


def to_toml(config: TrainConfig) -> str:
    """The configuration as a file that `read_config` reads back to the same one."""
    return "".join(
        f"{name} = {json.dumps(value, ensure_ascii=False)}\n"
        for name, value in asdict(config).items()
    )
