"""The recipe of the small model, from nothing: `l2p train l2p_core/shapes/shapes.toml`"""

import json
import os
import secrets
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..config import L2PConfig, Level
from ..decoder import LocalDecoder
from ..files.atomic import TEMPORARY, atomic_write, locked
from ..files.save import save_tensors
from ..flow import shifted
from ..model import L2PTransformer
from ..text import TEMPLATE, TextEncoder
from ..train.config import TrainConfig
from ..train.data import Batch
from ..train.optimizers import CombinedOptimizer
from ..train.run import WAIT, Run
from .scenes import SIZE, Scene, render, scenes, test_scenes, training_scenes
from .score import generate, score

CONFIG = L2PConfig(
    dim=192,
    n_heads=4,
    n_layers=4,
    n_refiner_layers=1,
    ffn_dim=384,
    cap_feat_dim=96,
    t_hidden_dim=256,
    bottleneck_dim=128,
    decoder=(
        Level("1", 16, 16, 32),
        Level("2", 32, 32, 24),
        Level("3", 48, 48, 48),
        Level("4", 64, 64, 64),
    ),
)
LAYOUT_SHIFT, SHIFT, FINISH_SHIFT = (
    12.0,
    3.0,
    0.35,
)  # noise levels that lean to where captions decide, even, to the last steps
UNEVEN, PATCHY = 0.4, 8  # share by which noise is uneven then, and over how many pixels
SCRATCH = ".text-encoder."  # beginning of the folder's name in which the text encoder is made
SCORED = 100  # prompts, each time samples are generated
GATED, QUIET = (
    8.0,
    0.5,
)  # a gate of the decoder reads the noisy pixels this quiet, and its opening counts this much


def make_text_encoder(folder: Path, captions: list[str]) -> TextEncoder:
    """A byte-level BPE tokenizer fitted to the captions and a Qwen3 encoder with random weights,
    saved as Z-Image's are.

    The encoder stays as it was drawn: its token embeddings tell words apart, and the transformer
    learns the rest."""
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        (TEMPLATE.format(prompt=caption) for caption in captions),
        vocab_size=512,
        new_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=CONFIG.cap_feat_dim,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=32,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        encoder.embed_tokens.weight.mul_(5)  # words stand out from what attention mixes in
    encoder.config.rope_theta = 1e6  # transformers 5 writes it elsewhere, 4 reads it here
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH, suffix=TEMPORARY) as name:
        scratch = Path(name)
        tokenizer.backend_tokenizer.save(str(scratch / "tokenizer.json"))
        (scratch / "tokenizer_config.json").write_text(
            json.dumps(
                {
                    "tokenizer_class": "Qwen2Tokenizer",
                    "eos_token": "<|im_end|>",
                    "pad_token": "<|endoftext|>",
                },
                indent=1,
            )
        )
        move_files(scratch, folder / "tokenizer")
        encoder.to(torch.bfloat16).save_pretrained(scratch)
        move_files(scratch, folder / "text_encoder")
    return TextEncoder.load(folder / "text_encoder", folder / "tokenizer", dtype=torch.float32)


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder into another, each atomically and with the permissions of a new
    file."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        with atomic_write(target / file.name) as stream:
            stream.write(file.read_bytes())
        file.unlink()


def initialise(model: L2PTransformer) -> None:
    """Let captions reach the layout from the first steps: patches whisper over a constant, and
    every gate is open."""
    initialise_ends(model)
    open_gates(model)


def initialise_ends(model: L2PTransformer) -> None:
    """Start the patch embedding small and the decoder as `initialise_decoder` says."""
    (embedder,) = model.all_x_embedder.values()
    torch.nn.init.normal_(embedder.weight, std=0.002)
    torch.nn.init.normal_(embedder.bias, std=0.5)
    initialise_decoder(model.local_decoder)


def open_gates(model: L2PTransformer) -> None:
    """Open the adaLN gates of all blocks: at 0 a block would learn nothing at first."""
    for block in (*model.noise_refiner, *model.layers):
        _, gate_a, _, gate_f = block.adaLN_modulation[0].bias.data.chunk(4)
        gate_a.fill_(1)
        gate_f.fill_(1)


@torch.no_grad()
def initialise_decoder(decoder: LocalDecoder) -> None:
    """Start as a linear network that gives the noise back, with a gate by which it can give back
    more.

    Channels come in pairs of opposite sign ("looks linear", Balduzzi et al. 2017, arXiv
    1702.08591): a pair passes x on whole, as SiLU(x) - SiLU(-x) = x. The outermost level's first
    three pairs carry the noisy pixels. The next six multiply them: the sum of a pair is A(x) =
    SiLU(x) + SiLU(-x), about x^2 / 2 near 0 and |x| far from it, so that A(x + g) - A(x - g) is
    about 2 x g for small ones, 2 x for a large g and nothing for none. The last steps, where the
    noise must be scaled up by 1 / sigma, learn to open that gate, and backgrounds come out
    clean."""

    def pairs(channels: int) -> torch.Tensor:
        return torch.cat([torch.eye(channels // 2), -torch.eye(channels // 2)], dim=1)

    def draw(conv: torch.nn.Conv2d, reads: torch.Tensor, paired: bool = True) -> torch.Tensor:
        """One of each pair of the outputs, by one of each pair of the inputs; `reads` is (those,
        all inputs)."""
        weight = torch.randn(
            conv.out_channels // (2 if paired else 1), len(reads), *conv.kernel_size
        )
        return weight / weight[0].numel() ** 0.5

    def put(
        conv: torch.nn.Conv2d, weight: torch.Tensor, reads: torch.Tensor, paired: bool = True
    ) -> None:
        weight = torch.einsum("oihw,ij->ojhw", weight, reads)
        conv.weight.copy_(torch.cat([weight, -weight]) if paired else weight)
        conv.bias.zero_()

    rgb, levels = range(3), decoder.config.decoder
    reads = torch.eye(3)
    for level in levels:
        conv = decoder.get_submodule(f"enc{level.name}.0")
        weight = draw(conv, reads)
        if level is levels[0]:
            weight[:3] = 0
            weight[rgb, rgb, 1, 1] = 1
        put(conv, weight, reads)
        reads = pairs(level.enc)
    conv, reads = decoder.bottleneck[0], torch.block_diag(reads, torch.eye(decoder.config.dim))
    put(conv, draw(conv, reads), reads)
    reads = pairs(decoder.config.bottleneck_dim)
    for level in reversed(levels):
        conv = decoder.get_submodule(f"up{level.name}.1")
        put(conv, draw(conv, reads, paired=False), reads, paired=False)
        conv, reads = (
            decoder.get_submodule(f"dec{level.name}.0"),
            torch.block_diag(torch.eye(level.up), pairs(level.enc)),
        )
        weight = draw(conv, reads)
        if level is levels[0]:
            gate = 0.1 * draw(conv, reads)[0, : level.up]
            weight[:9] = 0
            for first, sign in ((0, 0), (3, 1), (6, -1)):
                weight[first : first + 3, : level.up] = sign * gate
                weight[range(first, first + 3), range(level.up, level.up + 3), 1, 1] = (
                    QUIET if sign else 1
                )
        put(conv, weight, reads)
        reads = pairs(level.dec)
    weight = draw(decoder.out_conv, reads, paired=False) * 0.3
    weight[:, :9] = 0
    weight[rgb, rgb] = -torch.ones(3, 1, 1)
    put(decoder.out_conv, weight, reads, paired=False)
    by_sign = decoder.out_conv.weight.view(3, 2, -1)  # colour, sign within the pair, pair
    by_sign[rgb, :, range(3, 6)], by_sign[rgb, :, range(6, 9)] = -GATED, GATED


class Guide(torch.nn.Linear):
    """Reads each patch of the clean image off the transformer's features, and is discarded
    after training.

    Its error reaches the transformer straight, where the decoder's comes through nine convolutions
    that are themselves still learning."""

    def __init__(self, model: L2PTransformer):
        super().__init__(model.config.dim, 3 * model.config.patch_size**2)
        model.local_decoder.register_forward_pre_hook(
            lambda _, inputs: setattr(self, "features", inputs[1][0])
        )

    def loss(self, image: torch.Tensor) -> torch.Tensor:
        """Mean square of the last forward pass's reading less `image`, (B, 3, H, W)."""
        patch = round((self.out_features / 3) ** 0.5)
        reading = self(self.features.movedim(1, -1)).movedim(-1, 1)  # (B, 3 * p * p, h, w)
        return F.mse_loss(reading.float(), F.pixel_unshuffle(image, patch))


class Muon(torch.optim.Muon):
    """torch's, and it takes convolutions: as matrices with a row for each output channel, in the
    memory they lie in."""

    def __init__(self, parameters: list[torch.nn.Parameter], rate_factor: float, decay: float):
        self.matrices = [
            (parameter, torch.nn.Parameter(as_matrix(parameter.data))) for parameter in parameters
        ]
        assert all(matrix.data_ptr() == parameter.data_ptr() for parameter, matrix in self.matrices)
        super().__init__(
            [{"params": [matrix for _, matrix in self.matrices], "rate_factor": rate_factor}],
            weight_decay=decay,
            adjust_lr_fn="match_rms_adamw",
        )

    def step(self) -> None:
        """Update all matrices."""
        for parameter, matrix in self.matrices:
            matrix.grad, parameter.grad = as_matrix(parameter.grad), None
        super().step()


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A weight as (rows, columns)."""
    return (
        weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)
    )  # a view, as channels lie last


def uneven(noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise (B, 3, H, W) as sampling meets it in its last steps: here stronger and there weaker,
    over faint clouds.

    The steps before leave it so. A decoder that has only seen even noise tells its strength by
    looking rather than by the time, and takes such places for finished."""
    batch, _, height, width = noise.shape
    louder, clouds = (
        F.interpolate(
            torch.randn(batch, channels, height // PATCHY, width // PATCHY, generator=generator),
            noise.shape[2:],
            mode="bicubic",
        )
        for channels in (1, 3)
    )
    return noise * (1 + UNEVEN * louder) + UNEVEN * clouds


def noise_levels(batch: int, finishing: bool, generator: torch.Generator) -> torch.Tensor:
    """Draw sigmas, (batch,).

    At first most are near 1, where the caption alone decides; then they follow the sampling
    schedule. One in four, later one in two, is from the last steps, so that a narrow decoder learns
    clean backgrounds."""
    shift = torch.full((batch,), SHIFT if finishing else LAYOUT_SHIFT)
    shift[:: 2 if finishing else 4] = FINISH_SHIFT
    return shifted(torch.rand(batch, generator=generator), shift)


def make_files(checkpoint: Path, data: Path, seed: int) -> None:
    """What a run begins with: tokenizer, text encoder and an untrained model, and an image of
    every scene to train on."""
    data.parent.mkdir(parents=True, exist_ok=True)
    leftovers = [
        *data.parent.glob(f".{data.name}.*{TEMPORARY}"),
        *checkpoint.parent.glob(f"{SCRATCH}*{TEMPORARY}"),
    ]
    for leftover in leftovers:
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
    known = training_scenes()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_text_encoder(
            checkpoint.parent,
            sorted({caption for scene in scenes() for caption in captions_of(scene)}),
        )
        model = L2PTransformer(CONFIG)
        initialise(model)
    temporary = data.with_name(f".{data.name}.{secrets.token_hex(8)}{TEMPORARY}")
    temporary.mkdir()
    try:
        (temporary / "images").mkdir()
        rows = []
        for number, scene in enumerate(known):
            name = f"{number:04d}.png"
            rows.append({"file_name": name, "text": captions_of(scene)})
            render(scene).save(temporary / "images" / name)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (temporary / "metadata.jsonl").write_text(lines, encoding="utf-8")
        with atomic_write(checkpoint) as stream:
            save_tensors(
                stream,
                model.state_dict(),
                {
                    "format": "pt",
                    "modelspec.title": "L2P shapes",
                    "modelspec.resolution": f"{SIZE}x{SIZE}",
                    "modelspec.license": "Apache-2.0",
                },
            )
        temporary.rename(data)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def captions_of(scene: Scene) -> list[str]:
    """What an image is called, as often as it should be: one time in ten without the size, and one
    without the place."""
    return [scene.caption()] * 8 + [scene.caption(with_size=False), scene.caption(with_place=False)]


class ScoredRun(Run):
    """A run whose samples come with a score, on prompts that were never trained on."""

    def sample(self) -> None:
        """Generate samples and score them."""
        super().sample()
        if self.step == 0:
            return
        tests = test_scenes(SCORED)
        with self.sampling():
            images = generate(
                self.pipe,
                [scene.caption() for scene in tests],
                progress=False,
                height=SIZE,
                width=SIZE,
                num_inference_steps=16,
                sampler="ab2",
                shift=2.0,
            )
        self.pipe.unload_text_encoder()
        if self.main:
            with atomic_write(self.output / "samples" / f"step-{self.step:07d}.json") as stream:
                stream.write(json.dumps(score(images, tests)).encode())


class ShapesRun(ScoredRun):
    """From nothing to a model that generates, with all that such a run begins with."""

    def __init__(self, config: TrainConfig, progress: bool):
        checkpoint, data = Path(config.checkpoint), Path(config.data[0])
        if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(
                f"the recipe of the shapes is for one process, and here are {processes}"
            )
        if checkpoint.exists() != data.exists():
            there, missing = (checkpoint, data) if checkpoint.exists() else (data, checkpoint)
            raise ValueError(
                f"{there} exists and {missing} does not; the recipe makes both or neither. Take it"
                " away, or give others"
            )
        if not data.exists() and config.text_encoder:
            raise ValueError(
                f"{checkpoint} and {data} are not there, which another run leaves: l2p train"
                " l2p_core/shapes/shapes.toml"
            )
        if not data.exists():
            busy = (
                f"another run is making {data}. Wait for it to finish, or give another data folder"
            )
            with locked(data, busy, WAIT):
                if not data.exists():
                    make_files(checkpoint, data, config.seed)
        super().__init__(config, progress)

    def make_optimizer(self) -> CombinedOptimizer:
        """Muon for the blocks' matrices and the decoder's convolutions, AdamW for all else; slower
        in the decoder, where a gate makes much of little."""
        model = self.pipe.transformer.to(memory_format=torch.channels_last)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.guide = Guide(model).to(self.device)
        self.saved_tensors |= {
            f"guide.{name}": parameter for name, parameter in self.guide.named_parameters()
        }
        matrices: list[torch.nn.Parameter] = []
        convolutions: list[torch.nn.Parameter] = []
        outside: list[torch.nn.Parameter] = []
        rest = [*self.guide.parameters()]
        for name, parameter in self.trained.items():
            if name.startswith("local_decoder."):
                inner = parameter.dim() == 4 and "out_conv" not in name
                (convolutions if inner else outside).append(parameter)
            else:
                matrix = ".attention.to_" in name or ".feed_forward." in name
                (matrices if matrix else rest).append(parameter)
        decay = self.config.weight_decay
        return CombinedOptimizer(
            Muon(matrices, 1.5, decay),
            Muon(convolutions, 1.0, decay),
            torch.optim.AdamW(
                [{"params": rest}, {"params": outside, "rate_factor": 0.25}],
                betas=(0.9, 0.99),
                weight_decay=decay,
            ),
        )

    def batch(self, number: int) -> Batch:
        """Its noise and levels are of the run's first quarter, or of the rest."""
        batch, generator = super().batch(number), self.batches.generator(number, "shapes")
        finishing = 4 * number >= self.config.steps * self.config.accumulate
        if finishing:
            batch.noise[::2] = uneven(batch.noise[::2], generator)
        return replace(batch, sigma=noise_levels(len(batch.sigma), finishing, generator))

    def loss(self, batch: Batch) -> torch.Tensor:
        """The published objective, with the guide's gradient beside its own."""
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # attention written out: its backward pass is faster than the fused one's on a CPU
            loss = super().loss(batch)
        guiding = self.guide.loss(batch.images)
        return loss + guiding - guiding.detach()
