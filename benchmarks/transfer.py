"""The claim of L2P at toy scale: a latent model's middle layers, frozen, against the same pixel
model from nothing, and against frozen layers that learned nothing.

    python benchmarks/transfer.py --folder /tmp/transfer (two hours on two CPU cores)
    python benchmarks/transfer.py --folder /tmp/transfer --runs control
    python benchmarks/transfer.py --folder /tmp/klein --backbone flux2-klein --batch 8

A small latent model, a Z-Image or a FLUX.2 of diffusers, learns the shapes in latents that are
fixed: the 16 principal components of 8 x 8 pixels. `l2p convert` makes a pixel initialisation of
it, and of the same latent model before it learned anything. All get the same new ends, those of the
small model's recipe (the published decoder is too wide to learn anything in so few steps), and are
trained by that recipe, whose Muon takes Z-Image's matrices and leaves those of FLUX.2 to AdamW:

- transferred: the latent model's middle layers, frozen;
- from-nothing: the untrained model, with all of its layers;
- control: the untrained model, its middle layers frozen as they are.

Scores are of prompts that were never trained on. transfer.png shows the samples side by side,
transfer-loss.png the losses in black, red and blue. Every part that is in the folder already is not
made again, and an interrupted run resumes."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui_l2p.l2p_core import L2PTransformer
from comfyui_l2p.l2p_core.backbones import BACKBONES, FLUX2_KLEIN
from comfyui_l2p.l2p_core.config import Z_IMAGE_PROMPTS, L2PConfig, Level
from comfyui_l2p.l2p_core.diffusers_model import DiffusersL2P, diffusers_class
from comfyui_l2p.l2p_core.files.layout import read_layout
from comfyui_l2p.l2p_core.flow import euler, flow_matching_loss, guided_velocity, schedule
from comfyui_l2p.l2p_core.images import to_images, to_pixels
from comfyui_l2p.l2p_core.model import PUBLISHED, Hooks
from comfyui_l2p.l2p_core.shapes import train as recipe
from comfyui_l2p.l2p_core.shapes.scenes import SIZE, render, test_scenes, training_scenes
from comfyui_l2p.l2p_core.shapes.score import score
from comfyui_l2p.l2p_core.text import TextEncoder
from comfyui_l2p.l2p_core.train.config import read_config
from comfyui_l2p.l2p_core.train.record import draw_curves, grid, read_table
from comfyui_l2p.l2p_core.train.run import train
from comfyui_l2p.quant.convert import convert
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import trange

CHANNELS, BLOCK, PATCH = (
    16,
    8,
    2,
)  # of the latents; pixels to a side of one; latents to a side of a token
CONFIG = L2PConfig(
    patch_size=PATCH,
    dim=192,
    n_heads=4,
    n_layers=6,
    n_refiner_layers=1,
    ffn_dim=384,
    cap_feat_dim=96,
    t_hidden_dim=256,
    decoder=(Level("1", 8, 8, 8),),
)
# As of the published model, its double-stream block is trained, and single-stream ones are frozen.
FLUX2 = {
    "in_channels": CHANNELS * PATCH**2,
    "num_layers": 1,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": CONFIG.cap_feat_dim,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": False,
}
# Prompts, shift, steps and guidance scale of the small Z-Image. A prompt of the shapes has at most
# 18 tokens; padding to 512, as published, would be nine tenths of the work.
ROWS = {
    FLUX2_KLEIN.name: replace(
        FLUX2_KLEIN,
        prompts=Z_IMAGE_PROMPTS._replace(pad_to=24),
        shift=3.0,
        steps=30,
        guidance=2.0,
    )
}
FREEZE = "1:-1"  # four of six layers; of the full model's thirty, twenty
RUNS = {  # name: (latent model, frozen layers)
    "transferred": ("latent", FREEZE),
    "from-nothing": ("untrained", ""),
    "control": ("untrained", FREEZE),
}
ASPECTS = ("right", "shape", "colour", "background", "place", "size", "clean")
SETTINGS = Path(recipe.__file__).with_name("shapes.toml")


class Latents:
    """Images (B, 3, H, W) to (B, 16, H / 8, W / 8) and back, by the principal components of the
    training images' blocks."""

    def __init__(self, images: Tensor):
        blocks = F.pixel_unshuffle(images, BLOCK).movedim(1, -1).flatten(0, 2)
        self.mean = blocks.mean(0)
        _, _, components = torch.linalg.svd((blocks - self.mean)[::7], full_matrices=False)
        self.components = components[:CHANNELS]
        self.scale = ((blocks - self.mean) @ self.components.T).std(0)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → latents (B, C, H / 8, W / 8)."""
        blocks = F.pixel_unshuffle(images, BLOCK).movedim(1, -1)
        return ((blocks - self.mean) @ self.components.T / self.scale).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`, as far as there is one."""
        blocks = latents.movedim(1, -1) * self.scale @ self.components + self.mean
        return F.pixel_shuffle(blocks.movedim(-1, 1), BLOCK)


class LatentTransformer(L2PTransformer):
    """Z-Image's own ends around the layers: a linear that reads 2 x 2 latents, and one that writes
    them."""

    def __init__(self, config: L2PConfig):
        super().__init__(config)
        del self.local_decoder
        numbers, key = CHANNELS * PATCH**2, f"{PATCH}-1"
        self.all_x_embedder = nn.ModuleDict({key: nn.Linear(numbers, config.dim)})
        self.all_final_layer = nn.ModuleDict(
            {
                key: nn.ModuleDict(
                    {
                        "linear": nn.Linear(config.dim, numbers),
                        "adaLN_modulation": nn.Sequential(
                            nn.SiLU(), nn.Linear(config.t_dim, config.dim)
                        ),
                    }
                )
            }
        )

    def forward(
        self, latents: Tensor, t: Tensor, captions: list[Tensor], hooks: Hooks = PUBLISHED
    ) -> Tensor:
        """Predict latents - noise."""
        (last,) = self.all_final_layer.values()
        tokens = self.features(latents, t, captions, hooks).movedim(1, -1)  # (B, h, w, D)
        scale = 1 + last["adaLN_modulation"](self.t_embedder(t, latents.dtype))[:, None, None]
        out = last["linear"](F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * scale)
        return F.pixel_shuffle(
            out.unflatten(-1, (PATCH**2, CHANNELS)).transpose(-1, -2).flatten(-2).movedim(-1, 1),
            PATCH,
        )


class LatentFlux2(nn.Module):
    """FLUX.2 as diffusers has it, a token for 2 x 2 latents."""

    def __init__(self):
        super().__init__()
        self.transformer = diffusers_class(FLUX2_KLEIN.diffusers_class)(**FLUX2)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that `forward` computes in."""
        return self.transformer.dtype

    def forward(
        self, latents: Tensor, t: Tensor, captions: list[Tensor], hooks: Hooks = PUBLISHED
    ) -> Tensor:
        """Predict latents - noise. captions: all of one length."""
        h, w = (side // PATCH for side in latents.shape[-2:])
        x = F.pixel_unshuffle(latents, PATCH).flatten(2).transpose(1, 2)  # (B, N, C * 4)
        inputs = FLUX2_KLEIN.inputs(x, 1 - t, torch.stack(captions), h, w, hooks)
        velocity = self.transformer(**inputs, return_dict=False)[0]  # noise - latents
        return -F.pixel_shuffle(velocity.transpose(1, 2).unflatten(2, (h, w)), PATCH)


def open_gates(flux2: nn.Module) -> None:
    """Double the modulation of a FLUX.2: as it comes, layers add next to nothing."""
    for part in FLUX2_KLEIN.shared:
        for weight in flux2.get_submodule(part).parameters():
            weight.data *= 2


def quiet_patches(flux2: nn.Module) -> None:
    """Make patches quiet beside what attention brings from the prompt: their embedding has no
    bias."""
    nn.init.normal_(flux2.x_embedder.weight, std=0.002)


def untrained_model(backbone: str) -> nn.Module:
    """Return the latent model before it learns."""
    torch.manual_seed(0)
    if backbone in ROWS:
        model = LatentFlux2()
        open_gates(model.transformer)
        return model
    model = LatentTransformer(CONFIG)
    recipe.open_gates(model)
    return model


def learn_latents(
    model: nn.Module,
    folder: Path,
    encodings: dict[str, Tensor],
    steps: int,
    batch: int,
    mixed_precision: str,
) -> None:
    """Write latent.safetensors, and what it generates as latent.json."""
    scenes = training_scenes()
    images = torch.cat([to_pixels(render(scene)) for scene in scenes])
    latents = Latents(images)
    matrices, rest = [], []
    for name, weight in model.named_parameters():
        matrix = ".attention.to_" in name or ".feed_forward." in name
        (matrices if matrix else rest).append(weight)
    optimizer = recipe.CombinedOptimizer(
        recipe.Muon(matrices, 1.5, 0.01), torch.optim.AdamW([{"params": rest}], betas=(0.9, 0.99))
    )
    encoded, generator = latents.encode(images), torch.Generator().manual_seed(0)
    for step in trange(steps):
        chosen = torch.randint(len(scenes), (batch,), generator=generator).tolist()
        captions = [
            encodings[
                ("" if torch.rand((), generator=generator) < 0.1 else scenes[place].caption())
            ]
            for place in chosen
        ]
        sigma = recipe.noise_levels(len(chosen), 4 * step >= steps, generator)
        for group in optimizer.param_groups:
            group["lr"] = (
                2e-3 * min((step + 1) / 100, 1 - step / steps) * group.get("rate_factor", 1)
            )
        optimizer.zero_grad()
        autocast = torch.autocast("cpu", torch.bfloat16, mixed_precision == "bf16")
        with autocast, sdpa_kernel(SDPBackend.MATH):
            loss = flow_matching_loss(
                model,
                encoded[chosen],
                captions,
                torch.randn(encoded[chosen].shape, generator=generator),
                sigma,
            )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    save(model, folder / "latent.safetensors")
    tests = test_scenes(100)
    velocity = guided_velocity(
        model,
        [encodings[scene.caption()] for scene in tests],
        [encodings[""]] * 100,
        2.0,
        batch_guidance=True,
    )
    side = SIZE // BLOCK
    drawn = latents.decode(
        euler(velocity, torch.randn(100, CHANNELS, side, side, generator=generator), schedule(30))
    )
    known = latents.decode(latents.encode(torch.cat([to_pixels(render(scene)) for scene in tests])))
    (folder / "latent.json").write_text(
        json.dumps(
            {
                "loss": loss.item(),
                "score": score(to_images(drawn), tests),
                "score of the latents themselves": score(to_images(known), tests),
            }
        )
    )
    grid([to_images(drawn)[:8]]).save(folder / "latent.png")


def convert_to_pixels(latent: Path, file: Path) -> None:
    """`l2p convert`, and new ends."""
    wide = file.with_stem(f"{file.stem}-wide")
    convert(latent, wide)
    converted = {
        name: tensor
        for name, tensor in load_file(wide).items()
        if not name.startswith("local_decoder.")
    }
    config = replace(
        read_layout(wide).config,
        decoder=recipe.CONFIG.decoder,
        bottleneck_dim=recipe.CONFIG.bottleneck_dim,
    )
    of_zimage = isinstance(config, L2PConfig)
    model = L2PTransformer(config) if of_zimage else DiffusersL2P(config)
    model.load_state_dict(converted, strict=False)
    torch.manual_seed(0)
    if of_zimage:
        recipe.initialise_ends(model)
    else:
        quiet_patches(model)
        recipe.initialise_decoder(model.local_decoder)
        model.local_decoder.out_conv.weight.data *= config.row.sign
    save(model, file)


def save(model: nn.Module, file: Path) -> None:
    save_file(
        {
            name.removeprefix("transformer."): tensor.detach().contiguous()
            for name, tensor in model.state_dict().items()
        },
        file,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--backbone", choices=("z-image", *ROWS), default="z-image")
    parser.add_argument("--latent-steps", type=int, default=4000)
    parser.add_argument(
        "--steps", type=int, default=1500, help="of each pixel model (default 1500)"
    )
    parser.add_argument("--batch", type=int, default=16, help="images a step (default 16)")
    parser.add_argument(
        "--sample-every", type=int, help="steps between two scores (default: a fifth of --steps)"
    )
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument(
        "--mixed-precision",
        default="bf16",
        choices=("bf16", "no"),
        help="no is faster on a CPU without bfloat16 (default bf16)",
    )
    args = parser.parse_args()
    BACKBONES.update(ROWS)
    folder, data = args.folder, args.folder / "images"
    if not (data / "metadata.jsonl").exists():
        recipe.make_files(folder / "encoder" / "transformer.safetensors", data, 0)
    if not (folder / "untrained.safetensors").exists():
        save(untrained_model(args.backbone), folder / "untrained.safetensors")
    if "transferred" in args.runs and not (folder / "latent.json").exists():
        prompts = ROWS[args.backbone].prompts if args.backbone in ROWS else Z_IMAGE_PROMPTS
        encoder = TextEncoder.load(
            folder / "encoder" / "text_encoder",
            folder / "encoder" / "tokenizer",
            dtype=torch.float32,
            prompts=prompts,
        )
        with torch.no_grad():
            encodings = {
                caption: encoder.encode(caption)
                for caption in {
                    "",
                    *(scene.caption() for scene in (*training_scenes(), *test_scenes(100))),
                }
            }
        learn_latents(
            untrained_model(args.backbone),
            folder,
            encodings,
            args.latent_steps,
            args.batch,
            args.mixed_precision,
        )
    if "transferred" in args.runs:
        print((folder / "latent.json").read_text(), flush=True)
    for name in args.runs:
        source, freeze = RUNS[name]
        start = folder / f"{name}.safetensors"
        if not start.exists():
            convert_to_pixels(folder / f"{source}.safetensors", start)
        train(
            read_config(
                SETTINGS,
                {
                    "checkpoint": str(start),
                    "data": str(data),
                    "output": str(folder / name),
                    "text_encoder": str(folder / "encoder"),
                    "steps": args.steps,
                    "mixed_precision": args.mixed_precision,
                    "batch": args.batch,
                    "freeze": freeze,
                    "ema": 0.99,
                    "save_every": 100,
                    "keep": 1,
                    "sample_every": args.sample_every or args.steps // 5,
                },
            )
        )
    print("| | step | " + " | ".join(ASPECTS) + " |\n" + "|---" * (len(ASPECTS) + 2) + "|")
    for name in args.runs:
        for file in sorted((folder / name / "samples").glob("*.json")):
            scored = json.loads(file.read_text())
            print(
                f"| {name} | {int(file.stem.removeprefix('step-'))} | "
                + " | ".join(f"{scored[each]:.0f}" for each in ASPECTS)
                + " |"
            )
    sheets = [Image.open(folder / name / "samples.png").convert("RGB") for name in args.runs]
    grid([[ImageOps.expand(sheet, 4, "white") for sheet in sheets]]).save(folder / "transfer.png")
    draw_curves(
        [
            [
                row[:2]
                for row in read_table(folder / name / "log.csv", [int, float, float, float, float])
            ]
            for name in args.runs
        ],
        folder / "transfer-loss.png",
    )


if __name__ == "__main__":
    main()
