"""Examples → batches.

Which examples make batch number n, and every draw in it, follow from the seed and n alone, so a run
resumes anywhere."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from ..files.atomic import atomic_write, remove_leftovers
from ..files.header import CheckpointError, hash_files
from ..files.save import save_tensors
from ..flow import training_sigmas
from ..images import read_image, to_mask, to_pixels
from ..pipeline import L2PPipeline, draw_noise
from ..text import MAX_TOKENS, encoder_files
from ..tokenizer import find_tokenizer
from .buckets import crop_and_resize, plan_epoch, target_size
from .config import TrainConfig
from .dataset import Example, hold_out, no_seeds, read_examples

__all__ = [
    "Batch",
    "Batches",
    "Encodings",
    "Example",
    "crop_and_resize",
    "hold_out",
    "plan_epoch",
    "read_examples",
    "target_size",
]


@dataclass(frozen=True)
class Batch:
    """What one pass takes: B images of one size."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    captions: list[Tensor]  # B of (L, cap_feat_dim)
    noise: Tensor  # (B, 3, H, W)
    sigma: Tensor  # (B,)
    # (B, 1, H, W) of the squared error; None: 1
    weight: Tensor | None = field(default=None, kw_only=True)


class Encodings:
    """Captions as the text encoder gives them, one file each, in a folder that outlives the run.

    A file's name follows from the caption and from what encoded it, so another encoder never meets
    them."""

    def __init__(self, folder: Path, pipe: L2PPipeline):
        self.folder, self.pipe, prompts = folder, pipe, pipe.layout.config.prompts
        path = pipe.text_encoder_path
        described = [
            file
            for folder in (path, find_tokenizer(path, pipe.tokenizer_path))
            for pattern in ("*.json", "merges.txt")
            for file in sorted(folder.glob(pattern))
        ]
        self.maker = {
            "text_encoder_sha256": hash_files(encoder_files(path)),
            "tokenizer_and_config_sha256": hash_files(described),
            "dtype": str(pipe.dtype),
            "template": prompts.template,
            "layer": " ".join(map(str, prompts.hidden_states)),
            "max_tokens": str(MAX_TOKENS),
        }
        if prompts.pad_to:
            self.maker["pad_to"] = str(prompts.pad_to)
        if prompts.drop:
            self.maker["drop"] = str(prompts.drop)

    def add(self, captions: list[str], progress: bool = False) -> None:
        """Encode and store those that are not there, then take the encoder out of memory."""
        missing = [
            caption for caption in dict.fromkeys(captions) if not self.file(caption).exists()
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        for caption in tqdm(missing, "encoding captions", disable=not progress or not missing):
            features = self.pipe.text_encoder.encode(caption).cpu()
            with atomic_write(self.file(caption), clean=False) as stream:
                save_tensors(stream, {"features": features}, {"caption": caption, **self.maker})
        self.pipe.unload_text_encoder()

    def __getitem__(self, caption: str) -> Tensor:
        """(L, cap_feat_dim). Raises CheckpointError where the file is damaged."""
        file, width = self.file(caption), self.pipe.layout.config.cap_feat_dim
        try:
            features = load_file(file)["features"]
            if (
                features.dim() != 2
                or features.shape[1] != width
                or not 1 <= len(features) <= MAX_TOKENS
            ):
                raise ValueError(
                    f"it is {tuple(features.shape)}, expected (1 to {MAX_TOKENS}, {width})"
                )
            return features
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} can't be read ({error}). Delete it, and it is made again"
            ) from None

    def file(self, caption: str) -> Path:
        """Where a prompt's embeddings are kept."""
        digest = hashlib.sha256(json.dumps([caption, self.maker]).encode()).hexdigest()
        return self.folder / f"{digest[:40]}.safetensors"


class Batches:
    """The endless row of a run's steps; step n is the same whenever it is asked for.

    processes, rank: a batch of `config.batch` for each process, cut from one of `size`, as large as
    all together."""

    def __init__(
        self,
        examples: list[Example],
        encodings: Encodings,
        config: TrainConfig,
        patch_size: int,
        processes: int = 1,
        rank: int = 0,
    ):
        paired = (
            config.noise == "paired"
            or config.noise == "auto"
            and patch_size == 16
            and all(example.seed is not None for example in examples)
        )
        if paired and any(example.seed is None for example in examples):
            raise no_seeds(config)
        self.examples, self.encodings, self.config, self.patch_size, self.paired = (
            examples,
            encodings,
            config,
            patch_size,
            paired,
        )
        self.size, self.own = (
            processes * config.batch,
            slice(rank * config.batch, (rank + 1) * config.batch),
        )
        self._epoch = lru_cache(maxsize=2)(
            partial(plan_epoch, examples, config.batch, processes, config.seed)
        )
        self.per_epoch = len(self._epoch(0))

    def __getitem__(self, number: int) -> Batch:
        """Return this process's images of a step. Raises ValueError where they are of several
        sizes, which take `passes`."""
        passes = self.passes(number)
        if len(passes) > 1:
            raise ValueError(
                "a batch holds images of several sizes, which this recipe does not take. Give"
                " height and width, or batch 1"
            )
        return passes[0]

    def passes(self, number: int) -> list[Batch]:
        """Return this process's images of a step, as one batch for each size."""
        config = self.config
        order = self._row(number)
        generator = self.generator(number)
        sigma = training_sigmas(
            self.size, config.timestep_sampling, config.shift, self.patch_size, generator
        )
        dropped = torch.rand(self.size, generator=generator) < config.caption_dropout
        picks = torch.rand(self.size, generator=generator)
        return [
            self._batch(number, places, order, sigma, dropped, picks)
            for places in self._passes(order)
        ]

    def is_mixed(self, number: int) -> bool:
        """Return whether this process takes a step's images in several passes."""
        return len(self._passes(self._row(number))) > 1

    def _row(self, number: int) -> list[int]:
        """Return the examples of a step."""
        return self._epoch(number // self.per_epoch)[number % self.per_epoch]

    def _passes(self, order: list[int]) -> list[list[int]]:
        """Return the places of a row that this process takes, those of each pass.

        All processes make as many passes: where one has several sizes, each image is a pass."""
        places = list(range(self.size))[self.own]

        def size_at(place: int) -> tuple[int, int]:
            return self.examples[order[place]].size

        batch = self.config.batch
        mixed = any(
            len({size_at(place) for place in range(start, start + batch)}) > 1
            for start in range(0, self.size, batch)
        )
        if mixed and self.size > batch:
            return [[place] for place in places]
        return [list(group) for _, group in groupby(places, key=size_at)]

    def _batch(
        self,
        number: int,
        places: list[int],
        order: list[int],
        sigma: Tensor,
        dropped: Tensor,
        picks: Tensor,
    ) -> Batch:
        """Return the images at these places of a row, which are of one size."""
        examples = [self.examples[order[place]] for place in places]
        config = self.config
        height, width = examples[0].size
        pixels = [
            to_pixels(
                crop_and_resize(
                    read_image(example.file, config.background).convert("RGB"), height, width
                )
            )
            for example in examples
        ]
        captions = [
            "" if dropped[place] else example.captions[int(picks[place] * len(example.captions))]
            for place, example in zip(places, examples)
        ]
        seeds = [
            self._noise_seed(number, place, example) for place, example in zip(places, examples)
        ]
        return Batch(
            torch.cat(pixels),
            [self.encodings[caption] for caption in captions],
            draw_noise((len(examples), 3, height, width), seeds),
            sigma[places],
            weight=self._weight(examples),
        )

    def _weight(self, examples: list[Example]) -> Tensor | None:
        """Return the weight of each pixel, (B, 1, H, W), whose mean is the example's weight."""
        if all(example.mask is None and example.weight == 1 for example in examples):
            return None
        return torch.cat([weight_of(example, self.config.unmasked_weight) for example in examples])

    def fingerprint(self) -> str:
        """Return a hash of the sizes and of the first epoch's batches."""
        sizes = [example.size for example in self.examples]
        return hashlib.sha256(json.dumps([sizes, self._epoch(0)]).encode()).hexdigest()

    def _noise_seed(self, number: int, place: int, example: Example) -> int:
        """The seed of the noise that an example meets at one place of one batch."""
        if not self.paired:
            return self.generator(number, place).initial_seed()
        assert example.seed is not None  # `paired` asks for one of each
        return example.seed

    def generator(self, *number: int | str) -> torch.Generator:
        """For the draws of one batch, or of one place in it."""
        digest = hashlib.sha256(repr((self.config.seed, *number)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def weight_of(example: Example, unmasked: float) -> Tensor:
    """Return the weight of each pixel, (1, 1, H, W), whose mean is the example's weight.

    unmasked: what black weighs where white is 1."""
    height, width = example.size
    if example.mask is None:
        return torch.full((1, 1, height, width), example.weight)
    mask = to_mask(crop_and_resize(read_image(example.mask).convert("L"), height, width))
    weight = unmasked + (1 - unmasked) * mask
    return example.weight * weight / weight.mean().clamp_min(1e-6)
