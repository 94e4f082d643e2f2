"""The local decoder: a small U-Net from the noisy image and the transformer's features to pixels.

It is convolutions and pooling only, so a pixel depends on its surroundings alone, and a large
image can be computed in tiles without a trace: each tile is read with enough around it and only
the part that knows all it needs is kept."""

from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PixelConfig

# A cut at a multiple of 2^levels changes the 3 * 2^levels - 2 output pixels next to it: three
# innermost pixels.
HALO = 3


class LocalDecoder(nn.Module):
    """(B, 3, H, W) noisy pixels and (B, D, h, w) features → (B, 3, H, W). One class for all four
    patches."""

    def __init__(self, config: PixelConfig, operations=nn, **factory):
        """operations: where Conv2d comes from, so that ComfyUI can give its own. factory: its
        device and dtype."""
        super().__init__()

        def conv(channels_in: int, channels: int, kernel: int = 3) -> nn.Conv2d:
            return operations.Conv2d(channels_in, channels, kernel, padding=kernel // 2, **factory)

        self.config = config
        self.names = [level.name for level in config.decoder]  # outermost first
        channels = 3
        for level in config.decoder:
            self.add_module(
                f"enc{level.name}", nn.Sequential(conv(channels, level.enc), nn.SiLU(inplace=True))
            )
            channels = level.enc
        self.bottleneck = nn.Sequential(
            conv(channels + config.dim, config.bottleneck_dim, 1), nn.SiLU(inplace=True)
        )
        channels = config.bottleneck_dim
        for level in reversed(config.decoder):
            self.add_module(
                f"up{level.name}",
                nn.Sequential(nn.Upsample(scale_factor=2), conv(channels, level.up)),
            )
            self.add_module(
                f"dec{level.name}",
                nn.Sequential(conv(level.up + level.enc, level.dec), nn.SiLU(inplace=True)),
            )
            channels = level.dec
        self.out_conv = conv(channels, 3, 1)

    def forward(
        self, image: Tensor, features: Tensor | list[Tensor], tile: int | None = None
    ) -> Tensor | list[Tensor]:
        """image: (B, 3, H, W), H and W multiples of 2^levels. features: (B, D, h, w), one for each
        innermost pixel, or resized to that by nearest (patch 160 has tokens of 160 pixels and
        innermost pixels of 64); or a list of them, for which a list is returned and the image's
        half is computed once. tile: side in pixels of the tiles that are computed one after
        another, rounded up to a multiple of 2^levels; 0 for the whole at once; None for
        `tile_side`, or 0 where gradients are kept. The result is the same."""
        if isinstance(features, Tensor):
            return self._each(image, [features], tile)[0]
        return self._each(image, features, tile)

    def _each(self, image: Tensor, features: list[Tensor], tile: int | None) -> list[Tensor]:
        height, width = image.shape[-2:]
        step = 2 ** len(self.names)
        inner = height // step, width // step
        features = [
            each if each.shape[-2:] == inner else self.resize(each, inner) for each in features
        ]
        if tile is None:
            tile = (
                0
                if torch.is_grad_enabled()
                else tile_side(self.config, height, width, image.dtype, len(image))
            )
        assert tile >= 0
        if not tile:
            return self._whole(image, features)
        outputs = [torch.empty_like(image) for _ in features]
        for i, rows, columns in product(
            range(len(image)), cuts(height, tile, step), cuts(width, tile, step)
        ):
            parts = self._whole(
                image[i : i + 1, :, rows.read, columns.read],
                [each[i : i + 1, :, rows.innermost, columns.innermost] for each in features],
            )
            for output in outputs:  # each part is freed before the next tile is computed
                part = parts.pop(0)[:, :, rows.inside, columns.inside]
                output[i : i + 1, :, rows.kept, columns.kept] = part
            del part
        return outputs

    def resize(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize features to height and width, by nearest."""
        return F.interpolate(features, size, mode="nearest")

    def _whole(self, image: Tensor, features: list[Tensor]) -> list[Tensor]:
        """Frees each map as soon as nothing needs it; `decoder_bytes` counts along. Maps lie with
        their channels together, as the features come, which is faster on a CPU than planes."""
        x, skips = image.contiguous(memory_format=torch.channels_last), []
        for name in self.names:
            skips.append(self.get_submodule(f"enc{name}")(x))
            x = F.max_pool2d(skips[-1], 2)
        outputs = []
        for number, each in enumerate(features):
            last = number == len(features) - 1
            maps = skips if last else list(skips)
            y = torch.cat([x, each], dim=1)
            if last:
                del x
            y = self.bottleneck(y)
            for name in reversed(self.names):
                y = self.get_submodule(f"up{name}")(y)
                y = torch.cat([y, maps.pop()], dim=1)
                y = self.get_submodule(f"dec{name}")(y)
            outputs.append(self.out_conv(y))
            del y
        return outputs


class Cut(NamedTuple):
    """One tile along one side of the image."""

    read: slice  # the pixels it is computed from
    innermost: slice  # the same in innermost pixels
    kept: slice  # the pixels it gives
    inside: slice  # where those lie within what was read


def cuts(length: int, tile: int, step: int) -> list[Cut]:
    """Cut `length` pixels into tiles of `tile`, both rounded to innermost pixels of `step`."""
    length, tile = length // step, -(-tile // step)
    out = []
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        first, last = max(start - HALO, 0), min(stop + HALO, length)
        out.append(
            Cut(
                slice(first * step, last * step),
                slice(first, last),
                slice(start * step, stop * step),
                slice((start - first) * step, (stop - first) * step),
            )
        )
    return out


def tile_side(
    config: PixelConfig,
    height: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    budget: int | None = None,
) -> int:
    """0, uncut, where the maps fit in `budget` bytes, or else the largest tile whose maps do.

    budget: by default 1 GiB in bfloat16, which is two megapixels uncut at patch 16, or 16 bytes for
    each pixel where that is more: little beside the images of 12 that a solver keeps. Twice that
    in float32, for the same tiles. It doesn't go by the memory that is free, so that a seed's last
    bits stay the same. No tile is smaller than what is computed around it on two sides: an image
    in such tiles takes four times as long."""
    if budget is None:
        budget = dtype.itemsize * max(2**29, 8 * height * width)
    if batch * whole_bytes(config, height, width, dtype) <= budget:
        return 0
    step = 2 ** len(config.decoder)
    parts = 1
    while True:
        tile = -(-max(height, width) // (parts * step)) * step
        if (
            tile <= 2 * HALO * step
            or whole_bytes(config, *largest(height, width, tile, step), dtype) <= budget
        ):
            return tile
        parts += 1


def decoder_bytes(
    config: PixelConfig,
    height: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    tile: int | None = None,
) -> int:
    """What a pass without gradients holds at its peak, in bytes, beside image, features, output and
    weights.

    tile: as in `LocalDecoder.forward`. What the convolutions themselves use for a moment (cuDNN's
    workspace) comes on top."""
    step = 2 ** len(config.decoder)
    if tile is None:
        tile = tile_side(config, height, width, dtype, batch)
    resized = (
        0
        if step == config.patch_size
        else batch * config.dim * (height // step) * (width // step) * dtype.itemsize
    )
    if not tile:
        return resized + batch * whole_bytes(config, height, width, dtype)
    return resized + whole_bytes(config, *largest(height, width, tile, step), dtype)


def largest(height: int, width: int, tile: int, step: int) -> tuple[int, int]:
    """Height and width of the largest part that is computed at once."""
    return tuple(
        max(cut.read.stop - cut.read.start for cut in cuts(length, tile, step))
        for length in (height, width)
    )


def whole_bytes(config: PixelConfig, height: int, width: int, dtype: torch.dtype) -> int:
    """The peak of `LocalDecoder._whole` for one image, its maps counted in the order they come
    and go."""
    area, skips = height * width, []  # all in numbers, not bytes
    for (
        level
    ) in config.decoder:  # on the way in less is held than on the way out, beside the same skips
        skips.append(level.enc * area)
        area //= 4
    pooled, joined, x = (
        channels * area for channels in (level.enc, level.enc + config.dim, config.bottleneck_dim)
    )
    channels, peak = config.bottleneck_dim, sum(skips) + joined + max(pooled, x)
    for level in reversed(config.decoder):
        area *= 4
        up, joined = level.up * area, (level.up + level.enc) * area
        peak = max(peak, sum(skips) + x + channels * area + up, sum(skips) + up + joined)
        skips.pop()
        x, channels = level.dec * area, level.dec
        peak = max(peak, sum(skips) + joined + x)
    return peak * dtype.itemsize
