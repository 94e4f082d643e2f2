"""Train a small model of a `World` from nothing, in two runs:

    l2p train l2p_core/shapes/layout.toml     # the transformer alone, where the layout is decided
    l2p train l2p_core/shapes/world.toml      # the whole model, from where that ends

Scenes and prompts are drawn anew for every batch. Three things make a small network pool its
patches' evidence instead of letting each patch choose by itself (see docs/training.md):

- the target is the exact denoiser's E[x0 | x_t, prompt] in place of the image that was noised: the
  same expected gradient without the variance of the image;
- a linear guide reads three things off every token, and is discarded after training: its row and
  column, the scene's attributes, and its clean patch. In noise a token's position follows from
  attention alone, and nothing else makes the network keep it; the attributes are those of the whole
  scene, so a patch cannot answer from its own pixels;
- sigmas are drawn where meanings are chosen: (1 - sigma) / sigma between 0.0075 and 0.15.
"""

import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..files.atomic import atomic_write
from ..files.save import save_tensors
from ..flow import shifted
from ..images import to_pixels
from ..model import L2PTransformer
from ..text import TextEncoder
from ..train.config import TrainConfig
from ..train.data import Batch
from ..train.record import samples_file
from ..train.run import Run
from .candidates import CandidateDenoiser, Candidates, attribute_values
from .exact import ExactDenoiser, Posterior, readable_table
from .judge import score
from .train import CONFIG as BUNDLED_CONFIG
from .train import CombinedOptimizer, Muon, initialise, make_text_encoder, uneven
from .world import (
    COLOURS,
    FREE_WORLD,
    PLACES_WORLD,
    Prompt,
    Scene,
    Stated,
    World,
    choose,
    prompt_for,
)

WINDOW = (0.0075, 0.15)  # of a / sigma
GATE_LEVELS = (0.02, 0.04, 0.08)  # a / sigma at which R is logged; the gate is 0.95 at 0.04
SETTLED = 0.6  # sigma below which the exact denoiser is the image itself
# Of the guide's losses.
PIXEL_WEIGHT, ATTRIBUTE_WEIGHT, LOCAL_WEIGHT, POSITION_WEIGHT = 12.0, 0.3, 3.0, 0.1
EVIDENCE_WEIGHT = 0.3
EMPTY_SHARE = 0.1  # of prompts that are empty
# Depth before width: reading the prompt, finding the position, weighing a patch's evidence, pooling
# it
# and rendering the answer each take a layer.
CONFIG = replace(BUNDLED_CONFIG, dim=160, n_heads=5, n_layers=6, ffn_dim=480)
FREQUENCIES = 4  # of a patch's rows, and of its columns, that the embedder reads at first
EMBEDDER_GAIN, EMBEDDER_RATE = 0.12, 0.05  # of each frequency; of the embedder's learning rate
SHIFT, FINISH_SHIFT = 4.0, 0.35  # of the levels outside the window: even steps, the last steps
VOCABULARY_PROMPTS = 20_000  # that the tokenizer is fitted to
EXAMPLES = 16  # images of the data folder, whose first prompts are the samples


@dataclass(frozen=True)
class WorldBatch(Batch):
    """A batch that knows its prompts, for the exact denoiser. Its `captions` are empty: a batch is
    made in a thread beside training, where matrix products are not the same bit for bit. seed: of
    the candidates, where there are some."""

    prompts: list[Prompt]
    scenes: list[Scene]
    seed: int


class Question(NamedTuple):
    """What the model is given, and the exact denoiser's answer.

    noisy, target: (B, 3, H, W); target is E[x0 | x_t, prompt]. embeds: B tensors (L, width).
    marginals: each attribute's probabilities, (B, values). evidence: (B, h * w), each noisy patch's
    mean colour, brought to about 1, along object less background. local: the probabilities that
    each patch alone tells, (B, h * w, values), or None."""

    noisy: Tensor
    embeds: list[Tensor]
    target: Tensor
    marginals: dict[str, Tensor]
    evidence: Tensor
    local: dict[str, Tensor] | None


class Guide(nn.Module):
    """Reads linearly off each token what one step of the way needs from the one before:

    after the first main layer its position; after the second how much its patch's mean colour
    speaks for the object and against the background; after the middle one what its patch alone
    tells of the scene's attributes; before and after the last one what all patches tell of them;
    and its clean patch.

    It listens to the model's main layers and keeps what the last forward pass gave."""

    def __init__(self, model: L2PTransformer, side: int, values: dict[str, int]):
        """side: pixels of the square images. values: how many values each attribute has."""
        super().__init__()
        dim, self.patch = model.config.dim, model.config.patch_size
        self.side, self.values = side // self.patch, values
        self.pixels = nn.Linear(dim, 3 * self.patch**2)
        self.position = nn.Linear(dim, 2 * self.side)  # row, then column
        self.local = nn.Linear(dim, sum(values.values()))
        self.evidence = nn.Linear(dim, 1)
        self.attributes = nn.ModuleList(nn.Linear(dim, sum(values.values())) for _ in range(2))
        self.heard: dict[str, Tensor] = {}
        middle = len(model.layers) // 2 - 1
        for name, number in (
            ("first", 0),
            ("second", 1),
            ("middle", middle),
            ("next to last", -2),
            ("last", -1),
        ):
            model.layers[number].register_forward_hook(partial(self._hear, name))

    def _hear(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.heard[name] = output[:, : self.side**2]  # (B, h * w, D)

    def image(self) -> Tensor:
        """Return the clean image that it reads, (B, 3, H, W)."""
        patches = self.pixels(self.heard["last"]).transpose(1, 2)
        return F.pixel_shuffle(patches.unflatten(2, (self.side, self.side)), self.patch).float()

    def position_loss(self) -> Tensor:
        """Return the cross-entropy of the tokens' rows and columns."""
        row, column = self.position(self.heard["first"]).float().transpose(1, 2).split(self.side, 1)
        number = torch.arange(self.side, device=row.device)
        return sum(
            F.cross_entropy(logits, wanted.expand(len(logits), -1))
            for logits, wanted in (
                (row, number.repeat_interleave(self.side)),
                (column, number.repeat(self.side)),
            )
        )

    def divergence(self, logits: Tensor, marginals: dict[str, Tensor]) -> Tensor:
        """Return the divergence of the read probabilities from the given ones, summed over the
        attributes. logits: (B, h * w, sum of values). marginals: (B or B, h * w, values) for each.
        """
        loss = logits.new_zeros(())
        for part, name in zip(logits.float().split(list(self.values.values()), -1), self.values):
            wanted = marginals[name]
            wanted = (wanted[:, None] if wanted.dim() == 2 else wanted).expand_as(part)
            loss = loss + F.kl_div(part.log_softmax(-1), wanted, reduction="none").sum(-1).mean()
        return loss

    def loss(
        self,
        target: Tensor,
        marginals: dict[str, Tensor],
        evidence: Tensor,
        local: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the weighted sum of all, of the last forward pass.

        target: (B, 3, H, W). marginals: (B, values) for each attribute. evidence: (B, h * w).
        local: (B, h * w, values), what each patch alone tells."""
        loss = PIXEL_WEIGHT * F.mse_loss(self.image(), target)
        read = self.evidence(self.heard["second"]).float().squeeze(-1)
        loss = loss + EVIDENCE_WEIGHT * F.mse_loss(read, evidence)
        loss = loss + POSITION_WEIGHT * self.position_loss()
        for read, name in zip(self.attributes, ("next to last", "last")):
            loss = loss + ATTRIBUTE_WEIGHT / 2 * self.divergence(read(self.heard[name]), marginals)
        if local:
            loss = loss + LOCAL_WEIGHT * self.divergence(self.local(self.heard["middle"]), local)
        return loss


class LayoutRun(Run):
    """The transformer and the guide, in the window of levels alone. The decoder stays as it is."""

    world: World = PLACES_WORLD
    candidates = (
        0  # beside the true scene, for worlds that are too large to sum over; 0: all scenes
    )
    trains_decoder = False

    def __init__(self, config: TrainConfig, progress: bool):
        if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
            raise ValueError(
                f"found {processes} processes; the small model's recipe runs in one. "
                "Start it without accelerate launch"
            )
        checkpoint, data = Path(config.checkpoint), Path(config.data[0])
        if not checkpoint.exists() and not data.exists() and not config.text_encoder:
            make_files(self.world, checkpoint, data, config.seed)
        elif not checkpoint.exists() or not data.exists():
            missing = data if checkpoint.exists() else checkpoint
            raise ValueError(
                f"{missing} does not exist, and the recipe makes it only together with "
                "the other files of a first run. Run l2p_core/shapes/layout.toml first, "
                "or give another checkpoint and data"
            )
        self.exact = None if self.candidates else ExactDenoiser(self.world)
        self.few = CandidateDenoiser(self.world, self.candidates)
        super().__init__(config, progress)
        self.encoder = self.pipe.text_encoder
        self.pipe.unload_text_encoder()
        if compiler_exists():
            model = self.pipe.transformer
            for block in (*model.noise_refiner, *model.context_refiner, *model.layers):
                block.compile()

    def make_optimizer(self) -> CombinedOptimizer:
        """Muon for matrices and convolutions, AdamW for the rest; slower in the decoder."""
        model = self.pipe.transformer
        if self.trains_decoder:
            model.to(memory_format=torch.channels_last)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            self.guide = Guide(
                model,
                self.world.side,
                {name: len(values) for name, values in attribute_values(self.world).items()},
            )
        self.guide.to(self.device)
        self.saved_tensors |= {
            f"guide.{name}": each for name, each in self.guide.named_parameters()
        }
        matrices: list[torch.nn.Parameter] = []
        convolutions: list[torch.nn.Parameter] = []
        ends: list[torch.nn.Parameter] = []
        embedder: list[torch.nn.Parameter] = []
        rest = [*self.guide.parameters()]
        for name, parameter in self.trained.items():
            if name.startswith("all_x_embedder.") and name.endswith(".weight"):
                embedder.append(parameter)
            elif name.startswith("local_decoder."):
                inner = parameter.dim() == 4 and "out_conv" not in name
                (convolutions if inner else ends).append(parameter)
            else:
                matrix = ".attention.to_" in name or ".feed_forward." in name
                (matrices if matrix else rest).append(parameter)
        decay = self.config.weight_decay
        groups = [{"params": rest}, {"params": embedder, "rate_factor": EMBEDDER_RATE}]
        optimizers = [Muon(matrices, 1.5, decay)]
        if self.trains_decoder:
            groups.append({"params": ends, "rate_factor": 0.25})
            optimizers.append(Muon(convolutions, 1.0, decay))
        return CombinedOptimizer(
            *optimizers, torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=decay)
        )

    def batch(self, number: int) -> WorldBatch:
        """Draw scenes, prompts, noise and levels from the seed and the batch's number."""
        generator = self.batches.generator(number, "world")
        rng = random.Random(generator.initial_seed())
        scenes = [self.world.scene(rng) for _ in range(self.config.batch)]
        prompts = [self.prompt(scene, rng) for scene in scenes]
        images = torch.cat([to_pixels(self.world.image(scene)) for scene in scenes])
        noise = torch.randn(images.shape, generator=generator)
        sigma = self.levels(len(scenes), generator)
        noise = self.with_uneven(noise, sigma, generator)
        return WorldBatch(images, [], noise, sigma, prompts, scenes, rng.getrandbits(32))

    def prompt(self, scene: Scene, rng: random.Random) -> Prompt:
        """Describe the scene, with the empty prompt now and then, which guidance needs."""
        if rng.random() < EMPTY_SHARE:
            return Prompt("", (Stated(),))
        return prompt_for(self.world, scene, rng, choose(self.world, rng))

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """(count,) sigmas, all in the window."""
        return window_levels(count, generator)

    def with_uneven(self, noise: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """The noise to train with; here as it is."""
        return noise

    def loss(self, batch: Batch) -> Tensor:
        """The guide's loss: x0 and the probes."""
        assert isinstance(batch, WorldBatch)
        question = self.question(batch)
        with sdpa_kernel(SDPBackend.MATH):  # its backward pass is faster on a CPU
            self.model.features(question.noisy, 1 - batch.sigma, question.embeds)
        return self.guide.loss(
            question.target, question.marginals, question.evidence, question.local
        )

    def question(self, batch: WorldBatch) -> "Question":
        """What the model is given for a batch, and the exact denoiser's answer."""
        blend = batch.sigma[:, None, None, None]
        noisy = (1 - blend) * batch.images + blend * batch.noise
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            posterior = self.posterior(noisy.cpu(), batch.sigma.cpu(), batch)
            embeds = encode(self.encoder, [prompt.text for prompt in batch.prompts])
            local = self.local(noisy.cpu(), batch.sigma.cpu(), batch.prompts)
        target = torch.where(blend < SETTLED, batch.images, posterior.image().to(self.device))
        marginals = {name: part.to(self.device) for name, part in posterior.marginals().items()}
        return Question(
            noisy, embeds, target, marginals, self.evidence(noisy, batch.sigma, marginals), local
        )

    def evidence(self, noisy: Tensor, sigma: Tensor, marginals: dict[str, Tensor]) -> Tensor:
        """How much each patch's mean colour speaks for the object, (B, h * w)."""
        rgb = torch.tensor([COLOURS[name] for name in self.world.colours], device=self.device)
        apart = (marginals["colour"] - marginals["background"]) @ (rgb / 127.5)  # (B, 3)
        patch = self.guide.patch
        means = patch * F.avg_pool2d(noisy, patch).flatten(
            2
        )  # (B, 3, h * w), noise of 1 at sigma 1
        largest = sigma + patch * (1 - sigma)  # about, of noise and signal
        return torch.einsum("bc,bcn->bn", apart, means / largest[:, None, None]).float()

    def local(
        self, noisy: Tensor, sigma: Tensor, prompts: list[Prompt]
    ) -> dict[str, Tensor] | None:
        """What each patch alone tells of the attributes, (B, h * w, values)."""
        if not self.exact:
            return None
        found = self.exact.patchwise(noisy, sigma, prompts, self.guide.patch).marginals()
        return {
            name: part.unflatten(0, (len(noisy), -1)).to(self.device)
            for name, part in found.items()
        }

    def posterior(self, noisy: Tensor, sigma: Tensor, batch: WorldBatch) -> Posterior | Candidates:
        """What the exact denoiser, or one over a few candidates, makes of noisy images."""
        if self.exact:
            return self.exact(noisy, sigma, batch.prompts)
        return self.few(noisy, sigma, batch.prompts, batch.scenes, random.Random(batch.seed))

    def sample(self) -> None:
        """Write the table of R, where the exact denoiser is known, in place of samples: the decoder
        has learned nothing yet."""
        if self.step == 0 or not self.exact:
            return
        with self.sampling():
            table = readable_table(self.predict, self.exact, GATE_LEVELS)
        write_json(samples_file(self.output, self.step).with_suffix(".json"), {"R": table})

    def predict(self, noisy: Tensor, sigma: Tensor, prompts: list[Prompt]) -> Tensor:
        """The x0 prediction, by the guide."""
        captions = encode(self.encoder, [prompt.text for prompt in prompts])
        with sdpa_kernel(SDPBackend.MATH):
            self.pipe.transformer.features(noisy, 1 - sigma, captions)
        return self.guide.image()


class WholeRun(LayoutRun):
    """The whole model: a third of the levels in the window, the rest over all steps of sampling."""

    trains_decoder = True
    SCORED = 50  # prompts, each time samples are generated

    def levels(self, count: int, generator: torch.Generator) -> Tensor:
        """35 % in the window, then half of the rest on the last steps of sampling."""
        inside = round(0.35 * count)
        shift = torch.full((count - inside,), SHIFT)
        shift[::2] = FINISH_SHIFT
        others = shifted(1 - torch.rand(count - inside, generator=generator), shift)
        return torch.cat([window_levels(inside, generator), others])

    def with_uneven(self, noise: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
        """Make the noise of every other member below SETTLED uneven, as sampling leaves it."""
        low = torch.nonzero(sigma < SETTLED).flatten()[::2]
        noise[low] = uneven(noise[low], generator)
        return noise

    def loss(self, batch: Batch) -> Tensor:
        """The published objective with the exact target, and the guide's gradient beside it."""
        assert isinstance(batch, WorldBatch)
        question = self.question(batch)
        with sdpa_kernel(SDPBackend.MATH):
            velocity = -self.model(question.noisy, 1 - batch.sigma, question.embeds)
        off = (batch.images - question.target) / batch.sigma[:, None, None, None]
        loss = F.mse_loss(velocity.float(), batch.noise - batch.images + off)
        guiding = self.guide.loss(
            question.target, question.marginals, question.evidence, question.local
        )
        return loss + guiding - guiding.detach()

    def sample(self) -> None:
        """Generate samples and score them."""
        Run.sample(self)
        if self.step == 0:
            return
        rng = random.Random(0)
        scenes = [self.world.scene(rng, held_out=True) for _ in range(self.SCORED)]
        prompts = [prompt_for(self.world, scene, rng) for scene in scenes]
        with self.sampling():
            table = self.exact and readable_table(self.predict, self.exact, GATE_LEVELS)
            embeds = encode(self.encoder, [prompt.text for prompt in prompts])
            images = self.pipe(
                prompt_embeds=embeds,
                negative_prompt_embeds=self.encodings[""],
                height=self.world.side,
                width=self.world.side,
                sampler="ab2",
                seed=list(range(len(prompts))),
                num_inference_steps=20,
                shift=SHIFT,
                cfg_scale=1.0,
            )
        write_json(
            samples_file(self.output, self.step).with_suffix(".json"),
            {"R": table, "score": score(images, prompts, self.world)},
        )


class FreeLayoutRun(LayoutRun):
    """The first run in the world of free positions, with a few candidates for the target."""

    world = FREE_WORLD
    candidates = 8


class FreeWholeRun(WholeRun):
    """The second run in the world of free positions."""

    world = FREE_WORLD
    candidates = 8


@torch.no_grad()
def initialise_embedder(model: L2PTransformer) -> None:
    """Let the embedder read a patch's lowest frequencies alone.

    In the window all of a patch's signal is in a few of its 768 numbers, and a random projection to
    160 takes in the noise of all. The matching slow rate keeps the filters from being shaken apart
    by gradients that are mostly noise."""
    (embedder,) = model.all_x_embedder.values()
    patch, dim = model.config.patch_size, model.config.dim
    position, number = torch.arange(patch) + 0.5, torch.arange(FREQUENCIES)[:, None]
    waves = torch.cos(math.pi * number * position / patch)
    waves = waves / waves.norm(dim=1, keepdim=True)  # (frequencies, patch)
    planes = torch.einsum("ip,jq->ijpq", waves, waves).reshape(FREQUENCIES**2, patch**2)
    filters = torch.einsum("fp,cd->fcpd", planes, torch.eye(3)).reshape(3 * FREQUENCIES**2, -1)
    directions = torch.linalg.qr(torch.randn(dim, len(filters)))[0]  # (D, filters)
    embedder.weight.copy_(EMBEDDER_GAIN * directions @ filters)


def window_levels(count: int, generator: torch.Generator) -> Tensor:
    """(count,) sigmas whose a / sigma is log-uniform in WINDOW."""
    low, high = map(math.log, WINDOW)
    return 1 / (1 + (low + (high - low) * torch.rand(count, generator=generator)).exp())


@torch.no_grad()
def encode(encoder: TextEncoder, texts: Sequence[str]) -> list[Tensor]:
    """Return the prompt embeddings of many texts in one pass, (L, width) each."""
    ids = [encoder.token_ids(text) for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor(
        [row + [0] * (longest - len(row)) for row in ids]
    )  # it reads left to right
    embeds = encoder.model(padded.to(encoder.model.device))
    return [row[: len(each)] for row, each in zip(embeds, ids)]


def compiler_exists() -> bool:
    """Whether torch.compile can be used; it halves a step's time. L2P_COMPILE=0 turns it off."""
    return os.environ.get("L2P_COMPILE", "1") != "0" and shutil.which("g++") is not None


def write_json(file: Path, content: object) -> None:
    """Write JSON, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as stream:
        stream.write(json.dumps(content).encode())


def make_files(world: World, checkpoint: Path, data: Path, seed: int) -> None:
    """Write what a first run begins with: tokenizer, text encoder, untrained model, some images."""
    rng = random.Random(seed)
    scenes = [world.scene(rng) for _ in range(VOCABULARY_PROMPTS)]
    texts = sorted({prompt_for(world, scene, rng).text for scene in scenes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_text_encoder(checkpoint.parent, texts)
        model = L2PTransformer(CONFIG)
        initialise(model)
        initialise_embedder(model)
    unfinished = data.with_name(f"{data.name}.part")
    (unfinished / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, scene in enumerate(scenes[:EXAMPLES]):
        text = prompt_for(world, scene, rng).text or "a shape"
        rows.append({"file_name": f"{number:04d}.png", "text": text})
        world.image(scene).save(unfinished / "images" / rows[-1]["file_name"])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (unfinished / "metadata.jsonl").write_text(lines, encoding="utf-8")
    metadata = {
        "format": "pt",
        "modelspec.title": "L2P shapes",
        "modelspec.license": "Apache-2.0",
        "modelspec.resolution": f"{world.side}x{world.side}",
    }
    with atomic_write(checkpoint) as stream:
        save_tensors(stream, model.state_dict(), metadata)
    unfinished.rename(data)
