"""Further latent models that become pixel models, one row each: everything that the rest of the
project has to know of them.

A backbone is a transformer of diffusers. Patches of pixels enter through its input projection, made
3 * patch * patch wide; in place of its output projection stands the local decoder. Tensor names are
diffusers', and `local_decoder.*`. How to add one: docs/backbones.md."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .config import L2PConfig, Level, PixelConfig, PromptFormat, block_numbers, decoder_levels

if TYPE_CHECKING:
    from torch import Tensor

    from .diffusers_model import DiffusersL2P
    from .model import Hooks

Shapes = Mapping[str, tuple[int, ...]]
DECODER = "local_decoder"


@dataclass(frozen=True)
class Backbone:
    """A row of the table."""

    name: str  # in metadata
    title: str  # in messages
    repository: str  # on Hugging Face, with the transformer, the text encoder and the tokenizer

    diffusers_class: str
    # Tensor shapes → the arguments of the class that shapes tell; input channels are set apart.
    arguments: Callable[[Shapes], dict[str, Any]]
    # What a folder's config.json has to say beside them: the class is built with its defaults.
    settings: Mapping[str, Any]
    signature: str  # pattern of a tensor's name that no other model has
    stacks: Mapping[str, str]  # each list of blocks, in their order, and its length's argument

    input: str  # the linear that patches enter
    prompt_input: str  # the first layer that prompt embeddings enter; it has their width
    output: str  # the linear whose input goes to the decoder instead
    parts: tuple[str, ...]  # all others
    shared: tuple[str, ...]  # parts that all blocks use: training them would move frozen blocks

    # (patches (B, N, 3 * patch * patch), sigma (B,), prompts (B, L, width), rows, columns, hooks) →
    # the arguments of its forward.
    inputs: "Callable[[Tensor, Tensor, Tensor, int, int, Hooks], dict[str, Any]]"
    scales_positions: bool  # whether `inputs` follows `Hooks.rope_scale`
    sign: int  # of the decoder's output: -1 where the latent model predicts noise - image
    prompts: PromptFormat
    shift: float
    steps: int
    guidance: float

    lora: Mapping[str, str]  # what `lora_targets` calls them → pattern of linears in the blocks

    @cached_property
    def stems(self) -> tuple[str, ...]:
        """What names of a pixel model's tensors begin with."""
        inputs = self.input, self.prompt_input
        return tuple(f"{part}." for part in (*self.stacks, *inputs, *self.parts, DECODER))

    @property
    def metadata(self) -> dict[str, str]:
        """What files say of a model that other programs could not see in its tensors."""
        return {
            "l2p.backbone": self.name,
            "l2p.patch_order": "channel, row, column",
            "l2p.decoder_input": f"the input of {self.output}",
        }

    def config(self, shapes: Shapes, patch: int | None = None) -> "BackboneConfig":
        """Read the numbers off tensor shapes; of a latent model with the patch that it is to have.

        Raises KeyError, with the tensor's name, where one that is needed is absent, and ValueError
        for a shape that no such model has."""
        dim, numbers = shapes[f"{self.input}.weight"]
        if patch is None:
            patch = math.isqrt(numbers // 3)
            if numbers != 3 * patch**2:
                raise ValueError(
                    f"{self.input}.weight takes {numbers} numbers, which is no square patch of RGB"
                    " pixels"
                )
            decoder = decoder_levels(shapes)
            bottleneck = shapes[f"{DECODER}.bottleneck.0.weight"][0]
        else:
            decoder, bottleneck = (), L2PConfig.bottleneck_dim
        depths = {}
        for stack, argument in self.stacks.items():
            found = block_numbers(shapes, stack)
            if found != set(range(len(found))) or not found:
                raise ValueError(f"it lacks some of the blocks {stack}")
            depths[argument] = len(found)
        return BackboneConfig(
            patch_size=patch,
            dim=dim,
            n_layers=sum(depths.values()),
            cap_feat_dim=shapes[f"{self.prompt_input}.weight"][-1],
            decoder=decoder,
            bottleneck_dim=bottleneck,
            backbone=self.name,
            arguments=tuple({**self.arguments(shapes), **depths}.items()),
        )


@dataclass(frozen=True)
class BackboneConfig(PixelConfig):
    """Everything needed to build a `DiffusersL2P`."""

    hooks_run_blocks = False

    backbone: str
    patch_size: int
    dim: int
    n_layers: int
    cap_feat_dim: int
    arguments: tuple[tuple[str, Any], ...]  # of the class in diffusers
    decoder: tuple[Level, ...]
    bottleneck_dim: int

    def __post_init__(self) -> None:
        """Raise ValueError for sizes that no model has, before anything of them is built."""
        self.check_sizes({})

    @property
    def row(self) -> Backbone:
        """Its row of the table."""
        return BACKBONES[self.backbone]

    @property
    def depths(self) -> dict[str, int]:
        """Blocks of each stack, by its name."""
        arguments = dict(self.arguments)
        return {stack: arguments[argument] for stack, argument in self.row.stacks.items()}

    @property
    def steps_and_guidance(self) -> tuple[int, float]:
        """The published number of steps and guidance scale of the latent model."""
        return self.row.steps, self.row.guidance

    @property
    def shift(self) -> float:
        """The shift of the latent model's sigma schedule at 4,096 tokens."""
        return self.row.shift

    @property
    def prompts(self) -> PromptFormat:
        """How prompts are encoded."""
        return self.row.prompts

    @property
    def text_encoder(self) -> str:
        """The published model whose text encoder it takes."""
        return self.row.repository.rpartition("/")[2]

    @property
    def summary(self) -> str:
        """The sizes in one line."""
        layers = " + ".join(map(str, self.depths.values()))
        return (
            f"{self.row.title}: width {self.dim}, {layers} layers, prompt embeddings of"
            f" width {self.cap_feat_dim}"
        )

    def check_rope_scale(self, *factors: float) -> None:
        """Raise ValueError where a factor is not 1 and the model can't scale positions."""
        if not self.row.scales_positions and any(factor != 1 for factor in factors):
            raise ValueError(
                f"redraw is interpolated, and {self.row.title} can't scale positions. Set it to"
                " tiled or extrapolated"
            )

    def shallow(self) -> "BackboneConfig":
        """The same with one block in each stack."""
        one_each = dict.fromkeys(self.row.stacks.values(), 1)
        return replace(self, arguments=tuple({**dict(self.arguments), **one_each}.items()))

    def build(self) -> "DiffusersL2P":
        """The model, its weights on the meta device. Raises ImportError without diffusers."""
        from .diffusers_model import build

        return build(self)


def find_backbone(names: Iterable[str]) -> Backbone | None:
    """The row that these tensor names belong to, behind any prefix."""
    for name in names:
        for row in BACKBONES.values():
            if re.search(rf"(?:^|\.){row.signature}$", name):
                return row
    return None


def flux2_arguments(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a Flux2Transformer2DModel."""
    dim = shapes["x_embedder.weight"][0]
    (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return {
        "attention_head_dim": head,
        "num_attention_heads": dim // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "timestep_guidance_channels": shapes[
            "time_guidance_embed.timestep_embedder.linear_1.weight"
        ][1],
        "mlp_ratio": shapes["transformer_blocks.0.ff.linear_out.weight"][1] / dim,
        "axes_dims_rope": (head // 4,) * 4,
        "guidance_embeds": False,
    }


def flux2_inputs(
    x: "Tensor", sigma: "Tensor", prompt: "Tensor", rows: int, columns: int, hooks: "Hooks"
) -> dict[str, Any]:
    """What Flux2Transformer2DModel takes. Image tokens sit at (0, row, column, 0), those of the
    prompt at (0, 0, 0, number)."""
    import torch

    row, column = (
        torch.arange(count, dtype=torch.float32, device=x.device) * scale + shift
        for count, scale, shift in zip((rows, columns), hooks.rope_scale, hooks.rope_shift)
    )
    of_image = torch.zeros(rows * columns, 4, device=x.device)
    of_image[:, 1] = row.repeat_interleave(columns)
    of_image[:, 2] = column.repeat(rows)
    of_prompt = torch.zeros(prompt.shape[1], 4, device=x.device)
    of_prompt[:, 3] = torch.arange(prompt.shape[1], device=x.device)
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt,
        "timestep": sigma,
        "img_ids": of_image,
        "txt_ids": of_prompt,
    }


FLUX2_KLEIN = Backbone(
    name="flux2-klein",
    title="FLUX.2-klein",
    repository="black-forest-labs/FLUX.2-klein-base-4B",
    diffusers_class="Flux2Transformer2DModel",
    arguments=flux2_arguments,
    settings={"rope_theta": 2000, "eps": 1e-6},
    signature=r"single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj\.weight",
    stacks={
        "transformer_blocks": "num_layers",
        "single_transformer_blocks": "num_single_layers",
    },
    input="x_embedder",
    prompt_input="context_embedder",
    output="proj_out",
    parts=(
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
        "norm_out",
    ),
    shared=(
        "time_guidance_embed",
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",
    ),
    inputs=flux2_inputs,
    scales_positions=True,
    sign=-1,
    # Qwen3's template with thinking disabled, as diffusers' Flux2KleinPipeline has it.
    prompts=PromptFormat(
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        (9, 18, 27),
        512,
    ),
    shift=math.exp(2.02),  # the mu of that pipeline at 4,096 tokens and 50 steps
    steps=50,
    guidance=4.0,
    lora={
        "attention": (
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
            r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
        ),
        "feed_forward": r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)",
    },
)


def qwen_image_arguments(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a QwenImageTransformer2DModel."""
    dim = shapes["img_in.weight"][0]
    (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return {
        "attention_head_dim": head,
        "num_attention_heads": dim // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": (head // 8, head * 7 // 16, head * 7 // 16),
    }


def qwen_image_inputs(
    x: "Tensor", sigma: "Tensor", prompt: "Tensor", rows: int, columns: int, hooks: "Hooks"
) -> dict[str, Any]:
    """What QwenImageTransformer2DModel takes. It counts positions from the grid's middle."""
    return {
        "hidden_states": x,
        "encoder_hidden_states": prompt,
        "timestep": sigma,
        "img_shapes": [[(1, rows, columns)]] * len(x),
    }


QWEN_IMAGE = Backbone(
    name="qwen-image",
    title="Qwen-Image",
    repository="Qwen/Qwen-Image",
    diffusers_class="QwenImageTransformer2DModel",
    arguments=qwen_image_arguments,
    settings={"zero_cond_t": False, "use_additional_t_cond": False, "use_layer3d_rope": False},
    signature=r"transformer_blocks\.\d+\.img_mod\.1\.weight",
    stacks={"transformer_blocks": "num_layers"},
    input="img_in",
    prompt_input="txt_in",
    output="proj_out",
    parts=("time_text_embed", "txt_norm", "norm_out"),
    shared=("time_text_embed",),
    inputs=qwen_image_inputs,
    scales_positions=False,
    sign=-1,
    # The template of diffusers' QwenImagePipeline, which leaves out its system prompt's embeddings.
    prompts=PromptFormat(
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture,"
        " quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
        (-1,),
        drop=34,
        model_type="qwen2_5_vl",
    ),
    shift=math.exp(0.6935),  # the mu of that pipeline at 4,096 tokens
    steps=50,
    guidance=4.0,
    lora={
        "attention": (
            r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        ),
        "feed_forward": r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)",
    },
)

BACKBONES = {row.name: row for row in (FLUX2_KLEIN, QWEN_IMAGE)}
