"""The placement of a pipeline: which parts stay on the GPU and which are offloaded. One decision
for `l2p generate`, its `--estimate` and everything else that uses `L2PPipeline`."""

from collections.abc import Callable
from typing import NamedTuple

# Of the free memory, left for a kernel's workspace and for gaps between tensors. Not measured: no
# accelerator was at hand.
SHARE, RESERVE = 0.95, 500_000_000
TILES = (None, 512, 256)  # of the decoder, pixels; None is its own choice
GB = 1e9


class Needs(NamedTuple):
    """Bytes that generating takes."""

    text_encoder: int
    model: int
    streamed: int  # of the model, if it is offloaded
    passing: Callable[[int | None], int]  # decoder tile → images and what passes


class Placement(NamedTuple):
    """What stays on the GPU, and what is offloaded."""

    free_text_encoder: bool
    offload: bool
    decoder_tile: int | None
    reason: str  # one line
    encode_on_cpu: bool = False  # the text encoder does not fit even alone


def place(
    needs: Needs,
    free: int | None,
    free_text_encoder: bool | None = None,
    offload: bool | None = None,
    decoder_tile: int | None = None,
    can_stream: bool = True,
) -> Placement:
    """Return the fastest placement that fits.

    free: bytes of free memory, None where nothing has to fit (a CPU). free_text_encoder, offload,
    decoder_tile: what the user asked for; None leaves it open. can_stream: whether diffusers, which
    offloads, is installed. Tried in this order: everything stays; the text encoder is freed after
    the prompts are encoded; the decoder works in smaller tiles; the model is offloaded.
    A text encoder that does not fit even alone works on the CPU. Where nothing fits, the smallest
    is returned, and the reason says so."""
    if free is None:
        reason = (
            "as the options say, because the free memory of the device is not known or it is a CPU"
        )
        return Placement(bool(free_text_encoder), bool(offload), decoder_tile, reason)
    room = int(SHARE * free) - RESERVE
    encode_on_cpu = needs.text_encoder > room
    if encode_on_cpu:
        needs = needs._replace(text_encoder=0)
    candidates = [
        (freed, streamed, tile)
        for streamed in ((False, True) if can_stream else (False,))
        for freed, tile in ((False, None), *((True, tile) for tile in TILES))
        if free_text_encoder in (None, freed) and offload in (None, streamed)
    ]
    if not candidates:  # streaming is asked for, but diffusers is missing: its error says so later
        candidates = [(bool(free_text_encoder), bool(offload), None)]
    if decoder_tile is not None:
        candidates = [(freed, streamed, decoder_tile) for freed, streamed, _ in candidates]
    peaks: dict[tuple[bool, bool, int | None], int] = {}
    for chosen in candidates:
        peaks[chosen] = _peak(needs, *chosen)
        if peaks[chosen] <= room:
            break
    else:
        chosen = min(candidates, key=peaks.__getitem__)
    reason = _reason(needs, chosen, peaks[chosen], room, can_stream)
    if encode_on_cpu:
        reason = "prompts are encoded on the CPU, " + reason.partition(", ")[2]
    return Placement(*chosen, reason, encode_on_cpu)


def _peak(needs: Needs, freed: bool, streamed: bool, tile: int | None) -> int:
    """The most bytes that are held at one time."""
    generating = (needs.streamed if streamed else needs.model) + needs.passing(tile)
    return max(generating, needs.text_encoder) if freed else generating + needs.text_encoder


def _reason(
    needs: Needs, chosen: tuple[bool, bool, int | None], peak: int, room: int, can_stream: bool
) -> str:
    """What was chosen and why, as one line."""
    freed, streamed, tile = chosen
    parts = [
        "the text encoder is freed after encoding"
        if freed
        else "the text encoder stays on the GPU",
        "the model is offloaded to the CPU" if streamed else "the model stays on the GPU",
    ]
    if tile:
        parts.append(f"the decoder works in tiles of {tile} pixels")
    everything = _peak(needs, False, False, None)
    because = f"{peak / GB:.1f} GB at the peak, {room / GB:.1f} GB usable"
    if everything > room:
        because += f", {everything / GB:.1f} GB for everything at once"
    line = f"{', '.join(parts)} ({because})"
    if peak > room:
        line += ". This may run out of memory: use an INT8 checkpoint, a smaller size or batch"
        line += "" if can_stream else ", or install comfyui-l2p[offload] to offload the model"
    return line
