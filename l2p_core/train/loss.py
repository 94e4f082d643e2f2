"""The training objective: flow matching on pixels."""
import torch
from torch import Tensor

from ..model import L2PTransformer
from ..sampler import schedule


def flow_matching_loss(model: L2PTransformer, picture: Tensor, captions: list[Tensor], noise: Tensor,
                       sigma: Tensor) -> Tensor:
    """Mean square of (noise - picture) less the model's velocity, in float32: the published objective, unweighted.

    picture, noise: (B, 3, H, W), pictures in [-1, 1]. captions: B tensors (L, cap_feat_dim). sigma: (B,), 1 = noise."""
    blend = sigma[:, None, None, None]
    noisy = (1 - blend) * picture + blend * noise
    velocity = -model(noisy, 1 - sigma, captions)
    return torch.nn.functional.mse_loss(velocity.float(), noise - picture)


def draw_sigmas(count: int, sampling: str, shift: float, patch_size: int, generator: torch.Generator) -> Tensor:
    """(count,) noise levels to train on, float32 in (0, 1].

    sampling: grid, even over `schedule(500)` at patch 16 and `schedule(1000)` above, as published; uniform, even between 0
    and 1; logit-normal, the sigmoid of a standard normal (Stable Diffusion 3, arXiv 2403.03206, section 3.1)."""
    match sampling:
        case "grid":
            grid = schedule(500 if patch_size == 16 else 1000, shift=shift)[:-1]
            return grid[torch.randint(len(grid), (count,), generator=generator)]
        case "uniform":
            return 1 - torch.rand(count, generator=generator)
        case "logit-normal":
            return torch.randn(count, generator=generator).sigmoid()
    raise AssertionError(sampling)
