"""The training objective: flow matching on pixels."""
import torch
from torch import Tensor

from ..model import L2PTransformer


def flow_matching_loss(model: L2PTransformer, picture: Tensor, captions: list[Tensor], noise: Tensor,
                       sigma: Tensor) -> Tensor:
    """Mean square of (noise - picture) less the model's velocity, in float32: the published objective, unweighted.

    picture, noise: (B, 3, H, W), pictures in [-1, 1]. captions: B tensors (L, cap_feat_dim). sigma: (B,), 1 = noise;
    published training draws it evenly from `schedule(500)` at 1K."""
    blend = sigma[:, None, None, None]
    noisy = (1 - blend) * picture + blend * noise
    velocity = -model(noisy, 1 - sigma, captions)
    return torch.nn.functional.mse_loss(velocity.float(), noise - picture)
