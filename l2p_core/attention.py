"""Attention over (B, heads, S, head) → (B, S, D): by which kernel, of members with prompts of
unlike length, and within windows."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .neighbourhoods import Attend, Neighbourhoods, attend_in_neighbourhoods
from .settings import AUTO, BACKENDS, CUDNN, EFFICIENT, FLASH, MATH, SAGE

KERNELS = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    MATH: SDPBackend.MATH,
}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention by torch's own choice of kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def attention_by(backend: str) -> Attend:
    """Return the attention of a backend, one of BACKENDS. Raises ImportError for a missing
    package."""
    if backend == AUTO:
        return attention
    if backend == SAGE:
        return partial(_attention_by_sage, sage())

    def by_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(KERNELS[backend]):
            return attention(q, k, v)

    return by_kernel


def sage() -> Callable:
    """Return SageAttention's function (arXiv 2411.10958), which computes in 8 bits."""
    try:
        from sageattention import sageattn
    except ImportError:
        raise ImportError(
            "--attention sage needs SageAttention, which is not installed: pip install"
            " sageattention"
        ) from None
    return sageattn


def _attention_by_sage(sageattn: Callable, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sageattn(q, k, v, tensor_layout="HND", is_causal=False).transpose(1, 2).flatten(2)


def check_backend(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """Raise ValueError where the device has no such kernel for heads of that width: tried once, on
    a few tokens."""
    if backend not in BACKENDS:
        raise ValueError(f"attention is {backend!r}; expected one of {', '.join(BACKENDS)}")
    if backend == AUTO:
        return
    attend = attention_by(backend)
    few = torch.ones(1, 2, 128, width, device=device, dtype=dtype)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch's reasons, one each
            attend(few, few, few)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{device} has no {backend} attention for {dtype} and heads of width {width}. Use"
            " --attention auto, which takes the fastest kernel that torch has here"
        ) from error


def attend_by_parts(
    attend: Attend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    windows: Tensor | None,
) -> Tensor:
    """Return `attend` of each member over its own tokens, image tokens each within their window.

    lengths: (B,) on the CPU, see `member_lengths`. windows: the numbers of `Neighbourhoods`, on the
    CPU. None where there is one length, or one window."""
    if windows is not None:
        where = Neighbourhoods(*windows.tolist())
        return attend_in_neighbourhoods(attend, q, k, v, lengths, where)
    return attend(q, k, v) if lengths is None else attend_by_length(attend, q, k, v, lengths)


def attend_by_length(attend: Attend, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Attention of each member over its own first tokens; what is beyond becomes 0.

    A mask would do the same, but keeps torch from its fastest kernels. lengths: (B,). Neighbours of
    one length are computed together."""
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1] * v.shape[3])
    start = 0
    for length, count in zip(*torch.unique_consecutive(lengths, return_counts=True)):
        members, own = slice(start, start + int(count)), slice(int(length))
        out[members, own] = attend(*(each[members, :, own] for each in (q, k, v)))
        start += int(count)
    return out


@torch.library.custom_op(
    "comfyui_l2p::attend",
    mutates_args=(),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? windows, str backend) -> Tensor"
    ),
)
def _attend_operator(q, k, v, lengths, windows, backend):
    return attend_by_parts(attention_by(backend), q, k, v, lengths, windows)


@_attend_operator.register_fake
def _(q, k, v, lengths, windows, backend):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * v.shape[3])
