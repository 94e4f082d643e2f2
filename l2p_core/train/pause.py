"""Training pauses to generate samples: with other weights, and until an interrupt."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..interrupt import Noted
from .shard import is_split


class Stopped(Exception):
    """An interrupt or SIGTERM while samples are generated: nothing of the state changes then, so it
    needs no end of a step."""


@contextmanager
def stoppable(model: nn.Module, interrupted: Noted) -> Iterator[None]:
    """Within it the model's next block raises Stopped after an interrupt: a whole pass may take
    seconds."""

    def check(*_: object) -> None:
        if interrupted.is_set():
            raise Stopped

    blocks = (*model.blocks, model.local_decoder)
    hooks = [block.register_forward_pre_hook(check) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def swapped_weights(
    parameters: dict[str, nn.Parameter], values: dict[str, Tensor]
) -> Iterator[None]:
    """Within it the parameters have these values, as far as there are some."""

    def put(parameter: nn.Parameter, value: Tensor) -> None:
        if is_split(parameter):  # the place is known elsewhere
            parameter.data.copy_(value)
        else:
            parameter.data = value.to(parameter.dtype)

    before = {
        name: parameters[name].data.clone() if is_split(parameters[name]) else parameters[name].data
        for name in values
    }
    try:
        for name, value in values.items():
            put(parameters[name], value)
        yield
    finally:
        for name, value in before.items():
            put(parameters[name], value)
