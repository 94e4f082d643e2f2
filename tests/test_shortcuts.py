"""Options that draw with less work: the same numbers where they promise those, the known shortcut
where they take one."""

import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.flow import guided_velocity, schedule
from comfyui_l2p.l2p_core.model import Block
from comfyui_l2p.l2p_core.step_cache import StepCache
from helpers import apart

PROMPT, SETTINGS = (
    "a large red circle on a blue background, left",
    {
        "num_inference_steps": 4,
        "seed": 1,
    },
)


@pytest.fixture(scope="module")
def pipe():
    return L2PPipeline.from_pretrained(device="cpu", torch_dtype=torch.float32)


@pytest.fixture
def passes(pipe):
    """How many runs each main layer has had, as a list that grows: of the first, of the second."""
    counts, hooks = [0, 0], []
    for place in (0, 1):

        def count(*_, place=place):
            counts[place] += 1

        hooks.append(pipe.transformer.layers[place].register_forward_hook(count))
    yield counts
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
def test_both_passes_at_once_give_the_same_image(pipe, passes):
    wanted = pipe(
        [PROMPT, "a square"],
        negative_prompt="green, and more words than the others have",
        **SETTINGS,
    )
    assert passes[0] == 8
    pipe.batch_guidance = True
    try:
        found = pipe(
            [PROMPT, "a square"],
            negative_prompt="green, and more words than the others have",
            **SETTINGS,
        )
    finally:
        pipe.batch_guidance = False
    assert passes[0] == 12
    assert max(apart(*pair) for pair in zip(found, wanted)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("truncation, guided", [(1.0, 4), (0.3, 3), (0.2, 2), (0.0, 1)])
def test_guidance_ends_where_it_is_cut(pipe, passes, truncation, guided):
    """Against a loop by hand: times of four steps at shift 3 are 0, 0.1, 0.25 and 0.5."""
    captions, sigmas = [pipe.encode_prompt(PROMPT)], schedule(4)
    torch.testing.assert_close(1 - sigmas, torch.tensor([0, 0.1, 0.25, 0.5, 1]))
    positive, full = (
        guided_velocity(pipe.transformer, captions, [pipe.encode_prompt("")], scale)
        for scale in (1.0, 2.0)
    )
    x = torch.randn((1, 3, 96, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for step in range(4):
            x = x + (full if step < guided else positive)(x, sigmas[step].item()) * (
                sigmas[step + 1] - sigmas[step]
            )
    wanted = ((x[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255)
    passes[0] = 0
    assert apart(pipe(PROMPT, cfg_truncation=truncation, **SETTINGS), wanted) <= 1
    assert passes[0] == 4 + guided


def test_a_small_threshold_leaves_nothing_out(pipe, passes):
    wanted = pipe(PROMPT, **SETTINGS)
    assert apart(pipe(PROMPT, cache_threshold=1e-9, **SETTINGS), wanted) <= 1
    assert passes == [16, 16]


def test_a_large_threshold_runs_the_first_layer_alone_after_the_first_step(pipe, passes):
    before = pipe(PROMPT, **SETTINGS)
    passes[:] = [0, 0]
    after = pipe(PROMPT, cache_threshold=1e9, **SETTINGS)
    assert passes == [8, 2], "both passes of the first step ran all layers, the six after it one"
    assert apart(before, after) > 1


def run_step(cache, x, first, others):
    """One step through two layers that add these numbers to each image: (its output, images in the
    second)."""
    seen = []

    def add(numbers, remember=None):
        def layer(x, *_):
            if remember is not None:
                remember.append(len(x))
            return x + numbers[: len(x), None, None]

        return layer

    first, others = torch.tensor(first), torch.tensor(others)
    x = cache.run_block("layers", 0, add(first), x, torch.zeros(1), None, None)
    running = others[cache.running]
    x = cache.run_block("layers", 1, add(running, seen), x, torch.zeros(1), None, None)
    return x[:, 0, 0].tolist(), seen


def test_each_image_adds_what_was_added_last_where_it_changes_little():
    """1.05 is within a tenth of 1, 1.2 is not."""
    cache, x = StepCache(0.1, layers=2), torch.zeros(2, 4, 3)
    assert run_step(cache, x, [1.0, 1.0], [10.0, 20.0]) == ([11.0, 21.0], [2])
    found, seen = run_step(cache, x, [1.05, 1.2], [90.0, 30.0])
    assert found == pytest.approx([1.05 + 10, 1.2 + 30]) and seen == [1]
    found, seen = run_step(cache, x, [1.0, 1.2], [90.0, 90.0])
    assert found == pytest.approx([1 + 10, 1.2 + 30]) and seen == []
    assert (cache.ran, cache.skipped) == (3, 3)


@pytest.mark.slow
def test_an_image_does_not_depend_on_its_neighbours(pipe):
    """The same seed alone and beside another prompt, with layers skipped for one and not for the
    other."""
    settings = {"num_inference_steps": 16, "cache_threshold": 0.15, "seed": [3, 4]}
    together = pipe([PROMPT, "a small green star on a yellow background, top"], **settings)
    alone = pipe(PROMPT, **{**settings, "seed": 3})
    assert apart(together[0], alone) <= 1
    assert apart(alone, pipe(PROMPT, **{**settings, "seed": 3, "cache_threshold": 0.0})) > 1


def test_in_windows_nothing_is_cached(pipe, passes):
    pipe(PROMPT, height=192, width=96, stages=2, redraw="windows", cache_threshold=1e9, **SETTINGS)
    first_stage, windows = 8, 2 * 3  # one step of the second stage, in three windows
    assert passes == [first_stage + windows, 2 + windows]


@pytest.mark.slow
def test_compiled_blocks_draw_the_same(pipe, monkeypatch):
    """Traced by torch's compiler, without the machine code, which takes a C++ compiler and
    minutes."""
    compiled = []

    def trace(block, **_):
        compiled.append(block)
        torch.nn.Module.compile(block, backend="aot_eager")

    monkeypatch.setattr(Block, "compile", trace, raising=False)
    found = L2PPipeline.from_pretrained(
        device="cpu", torch_dtype=torch.float32, compile_blocks=True
    )(PROMPT, **SETTINGS)
    assert len(compiled) == 6 and apart(found, pipe(PROMPT, **SETTINGS)) <= 1


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"cfg_truncation": 1.1}, "a number from 0 to 1"),
        ({"cfg_truncation": -0.1}, "a number from 0 to 1"),
        ({"cache_threshold": -1.0}, "a number from 0$"),
        ({"cache_threshold": float("nan")}, "a number from 0$"),
    ],
)
def test_shares_out_of_bounds_are_rejected(pipe, settings, expected):
    with pytest.raises(ValueError, match=expected):
        pipe(PROMPT, **settings, **SETTINGS)
