"""The local decoder: a small U-Net from the noisy picture and the transformer's features to pixels."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import L2PConfig


class LocalDecoder(nn.Module):
    """(B, 3, H, W) noisy pixels and (B, D, H/p, W/p) features → (B, 3, H, W). One class for all four patches."""

    def __init__(self, config: L2PConfig, operations=nn, **factory):
        """operations: where Conv2d comes from, so that ComfyUI can give its own. factory: its device and dtype."""
        super().__init__()

        def conv(channels_in: int, channels: int, kernel: int = 3) -> nn.Conv2d:
            return operations.Conv2d(channels_in, channels, kernel, padding=kernel // 2, **factory)

        self.names = [stage.name for stage in config.decoder]  # outermost first
        channels = 3
        for stage in config.decoder:
            self.add_module(f"enc{stage.name}", nn.Sequential(conv(channels, stage.enc), nn.SiLU()))
            channels = stage.enc
        self.bottleneck = nn.Sequential(conv(channels + config.dim, config.bottleneck_dim, 1), nn.SiLU())
        channels = config.bottleneck_dim
        for stage in reversed(config.decoder):
            self.add_module(f"up{stage.name}", nn.Sequential(nn.Upsample(scale_factor=2), conv(channels, stage.up)))
            self.add_module(f"dec{stage.name}", nn.Sequential(conv(stage.up + stage.enc, stage.dec), nn.SiLU()))
            channels = stage.dec
        self.out_conv = conv(channels, 3, 1)

    def forward(self, image: Tensor, features: Tensor) -> Tensor:
        x, skips = image, []
        for name in self.names:
            skips.append(self.get_submodule(f"enc{name}")(x))
            x = F.max_pool2d(skips[-1], 2)
        if features.shape[-2:] != x.shape[-2:]:  # patch 160: tokens are H/160, the pooled picture is H/64
            features = F.interpolate(features, x.shape[-2:], mode="nearest")
        x = self.bottleneck(torch.cat([x, features], dim=1))
        for name in reversed(self.names):
            x = self.get_submodule(f"up{name}")(x)
            x = self.get_submodule(f"dec{name}")(torch.cat([x, skips.pop()], dim=1))
        return self.out_conv(x)
