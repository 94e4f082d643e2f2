"""The model's numbers, read from the shapes of a checkpoint's tensors."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from .model import L2PTransformer


class Level(NamedTuple):
    """One resolution of the local decoder: its name in the checkpoint and its channel counts."""

    name: str
    enc: int  # channels that enc<name> keeps for the skip connection
    up: int  # channels that up<name> gives
    dec: int  # channels that dec<name> gives to the next level


# Outermost first; the one order all published decoders follow (a patch uses a subset).
LEVEL_ORDER = ("_10k_a", "_8k", "0", "0b", "1", "2", "3", "4")

_INNER = (
    Level("1", 64, 64, 32),
    Level("2", 128, 128, 64),
    Level("3", 256, 256, 128),
    Level("4", 512, 512, 256),
)
_OUTER = (Level("0", 16, 16, 16), Level("0b", 32, 32, 16))
# Patch 16: T2I-L2P. The others: PixVerve-95K, folder L2P-ZImage-HR.
PUBLISHED_DECODERS: dict[int, tuple[Level, ...]] = {
    16: (Level("1", 64, 64, 64), *_INNER[1:]),
    64: _OUTER + _INNER,
    128: (Level("_8k", 3, 16, 16), *_OUTER, *_INNER),
    160: (Level("_10k_a", 3, 16, 16), *_OUTER, *_INNER[:3]),
}


MAX_SIZE = 2**17  # of every width, ten times the published ones


class PromptFormat(NamedTuple):
    """How a prompt becomes prompt embeddings."""

    template: str
    # Of these hidden states of the text encoder, numbered as transformers numbers them: 0 is the
    # embedding, negative ones count from the end. Several are joined along the width.
    hidden_states: tuple[int, ...]
    pad_to: int = 0  # tokens that a prompt is padded to, and padding is attended to; 0: none
    drop: int = 0  # leading tokens of the template whose embeddings are left out
    model_type: str = "qwen3"  # of the text encoder's config.json; transformers runs others


# What Qwen3's own chat template gives for one user turn with thinking enabled. The prompt goes in
# as it is. The hidden state is what the last layer takes in, without the final norm.
Z_IMAGE_PROMPTS = PromptFormat(
    "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", (-2,)
)


class PixelConfig:
    """The numbers that every model has, whatever its transformer is."""

    patch_size: int
    dim: int  # of the tokens that the decoder takes
    n_layers: int
    cap_feat_dim: int
    decoder: tuple[Level, ...]
    bottleneck_dim: int

    # Whether hooks can change how blocks run. Settings that need that are rejected otherwise.
    hooks_run_blocks: ClassVar[bool] = True

    def check_sizes(self, others: Mapping[str, int]) -> None:
        """Raise ValueError where one of the sizes, or of others by name, is one that no model
        has."""
        sizes = {
            "patch_size": self.patch_size,
            "dim": self.dim,
            **others,
            "cap_feat_dim": self.cap_feat_dim,
            "bottleneck_dim": self.bottleneck_dim,
        }
        for level in self.decoder:
            sizes |= {
                f"decoder level {level.name}, {part}": getattr(level, part)
                for part in ("enc", "up", "dec")
            }
        for name, size in sizes.items():
            if not 1 <= size <= MAX_SIZE:
                raise ValueError(f"{name} is {size}; expected 1 to {MAX_SIZE}")

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this: whole patches, and whole decoder pixels (320
        at patch 160)."""
        return math.lcm(self.patch_size, 2 ** len(self.decoder))

    @property
    def nominal_size(self) -> int:
        """The square side that gives the 64 x 64 tokens the published models were trained on."""
        return 64 * self.patch_size

    @property
    def depths(self) -> dict[str, int]:
        """Blocks of each stack, by its name."""
        raise NotImplementedError

    @property
    def steps_and_guidance(self) -> tuple[int, float]:
        """The published number of steps and guidance scale."""
        raise NotImplementedError

    @property
    def shift(self) -> float:
        """The published shift of the sigma schedule."""
        return 3.0

    @property
    def prompts(self) -> PromptFormat:
        """How prompts are encoded."""
        return Z_IMAGE_PROMPTS

    @property
    def text_encoder(self) -> str | None:
        """The published model whose text encoder it takes; None for another one."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """The sizes in one line."""
        raise NotImplementedError

    def with_patch(self, patch: int) -> "PixelConfig":
        """The same with another patch, and the published decoder for it."""
        changes = {"patch_size": patch, "decoder": PUBLISHED_DECODERS[patch]}
        return replace(self, **changes)  # type: ignore[type-var]

    def check_rope_scale(self, *factors: float) -> None:
        """Raise ValueError where the model can't scale positions by these factors."""

    def shallow(self) -> "PixelConfig":
        """The same with one block in each stack."""
        raise NotImplementedError

    def build(self) -> Any:
        """The model, its weights on the meta device."""
        raise NotImplementedError


@dataclass(frozen=True)
class L2PConfig(PixelConfig):
    """Everything needed to build an `L2PTransformer`. The defaults are the published 1K model."""

    patch_size: int = 16
    dim: int = 3840
    n_heads: int = 30
    n_layers: int = 30
    n_refiner_layers: int = 2
    ffn_dim: int = 10240
    cap_feat_dim: int = 2560
    t_hidden_dim: int = 1024
    decoder: tuple[Level, ...] = PUBLISHED_DECODERS[16]
    bottleneck_dim: int = 512

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no model has, before anything of them is built."""
        self.check_sizes(
            {"n_heads": self.n_heads, "ffn_dim": self.ffn_dim, "t_hidden_dim": self.t_hidden_dim}
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def axes_dims(self) -> tuple[int, int, int]:
        """Numbers of each head that carry caption position, row and column: 32, 48, 48 of 128."""
        return self.head_dim // 4, self.head_dim * 3 // 8, self.head_dim * 3 // 8

    @property
    def t_dim(self) -> int:
        """Width of the time embedding."""
        return min(self.dim, 256)

    @property
    def depths(self) -> dict[str, int]:
        """Blocks of each stack, by its name."""
        return {
            "layers": self.n_layers,
            "noise_refiner": self.n_refiner_layers,
            "context_refiner": self.n_refiner_layers,
        }

    @property
    def steps_and_guidance(self) -> tuple[int, float]:
        """The published settings: 30 steps and guidance 2 at patch 16, 50 and 4 above."""
        return (30, 2.0) if self.patch_size == 16 else (50, 4.0)

    @property
    def text_encoder(self) -> str | None:
        """The published model whose text encoder it takes; None for another one."""
        return "Z-Image-Turbo" if self.cap_feat_dim == L2PConfig.cap_feat_dim else None

    @property
    def summary(self) -> str:
        """The sizes in one line."""
        return (
            f"width {self.dim}, {self.n_heads} heads, {self.n_layers} + {self.n_refiner_layers} +"
            f" {self.n_refiner_layers} layers, prompt embeddings of width"
            f" {self.cap_feat_dim}"
        )

    def shallow(self) -> "L2PConfig":
        """The same with one block in each stack."""
        return replace(self, n_layers=1, n_refiner_layers=1)

    def build(self) -> "L2PTransformer":
        """The model, its weights on the meta device."""
        import torch

        from .model import L2PTransformer

        with torch.device("meta"):
            return L2PTransformer(self)

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "L2PConfig":
        """Read the numbers off tensor shapes under the published names (`layout.read_layout` gives
        these).

        Raises KeyError, with the tensor's name, where one that is needed is absent, and ValueError
        for a shape that no L2P model has."""

        embedder = next(
            filter(
                None,
                (re.fullmatch(r"all_x_embedder\.([0-9]{1,4})-1\.weight", key) for key in shapes),
            ),
            None,
        )
        if embedder is None:
            raise KeyError("all_x_embedder.<patch>-1.weight")
        patch_size = int(embedder[1])
        dim, patch_numbers = shapes[embedder[0]]
        if patch_numbers != 3 * patch_size**2:
            raise ValueError(
                f"{embedder[0]} takes {patch_numbers} numbers, "
                f"but a patch of {patch_size} x {patch_size} RGB pixels has {3 * patch_size**2}"
            )
        head_dim = shapes["layers.0.attention.norm_q.weight"][0]
        if dim % head_dim or head_dim % 16:
            raise ValueError(
                f"heads of {head_dim} numbers do not fit a width of {dim}: "
                "a head must be a multiple of 16 and divide the width"
            )

        def depth(name: str) -> int:
            found = block_numbers(shapes, name)
            if found != set(range(len(found))):
                raise ValueError(f"it has {name}.{max(found)}, but not every {name} before it")
            return len(found)

        return cls(
            patch_size=patch_size,
            dim=dim,
            n_heads=dim // head_dim,
            n_layers=depth("layers"),
            n_refiner_layers=depth("noise_refiner"),
            ffn_dim=shapes["layers.0.feed_forward.w1.weight"][0],
            cap_feat_dim=shapes["cap_embedder.1.weight"][1],
            t_hidden_dim=shapes["t_embedder.mlp.0.weight"][0],
            decoder=decoder_levels(shapes),
            bottleneck_dim=shapes["local_decoder.bottleneck.0.weight"][0],
        )


def decoder_levels(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Level, ...]:
    """The local decoder's levels. Raises KeyError where one is not whole."""

    def level(name: str) -> Level:
        return Level(
            name,
            *(
                shapes[f"local_decoder.{part}.weight"][0]
                for part in (f"enc{name}.0", f"up{name}.1", f"dec{name}.0")
            ),
        )

    return tuple(
        level(name) for name in LEVEL_ORDER if f"local_decoder.enc{name}.0.weight" in shapes
    )


def block_numbers(names: Iterable[str], stack: str = "layers") -> set[int]:
    """The blocks that tensors of a stack belong to: 5 for layers.5.attention.to_q.weight. Beyond
    four digits it is no model's."""
    pattern = re.compile(rf"{stack}\.([0-9]{{1,4}})\.")
    return {int(match[1]) for name in names if (match := pattern.match(name))}
