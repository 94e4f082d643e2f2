"""Drawing above the trained size: the plan, windows, and that a stage is an image-to-image of the
one before it."""

import warnings

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core import attention as kernels
from comfyui_l2p.l2p_core.batch import is_generated
from comfyui_l2p.l2p_core.images import save_image
from comfyui_l2p.l2p_core.model import rope_of_image
from comfyui_l2p.l2p_core.settings import (
    EXTRAPOLATED,
    INTERPOLATED,
    REFINEMENTS,
    TILED,
    Settings,
    checked,
)
from comfyui_l2p.l2p_core.stages import Stage, by_windows, misfit, plan_stages, windows
from PIL import Image

PROMPT = "a large red circle on a blue background, left"
FEW = {"num_inference_steps": 6, "seed": 3}


@pytest.fixture(scope="module")
def pipe():
    return L2PPipeline.from_pretrained(torch_dtype=torch.float32)


def plan(height, width, trained=(1024, 1024), **settings):
    return plan_stages(
        Settings(
            height=height, width=width, cfg_scale=2, **{"num_inference_steps": 30, **settings}
        ),
        trained,
        16,
    )


def test_each_stage_is_twice_the_one_before_it():
    assert plan(4096, 2048, stages=3, stage_strength=0.3, redraw="tiled") == [
        Stage(1024, 512, 30, 1.0, 0, 1.0, 2, 0),
        Stage(2048, 1024, 9, 0.3, 1024, 1.0, 2, 0),
        Stage(4096, 2048, 9, 0.3, 1024, 1.0, 2, 0),
    ]
    later = {"stage_strength": 0.3, "stage_cfg_scale": 1, "stage_attention": "local"}
    assert plan(4096, 4096, stages=3, **later) == [
        Stage(1024, 1024, 30, 1.0, 0, 1.0, 2, 0),
        Stage(2048, 2048, 9, 0.3, 0, 0.5, 1, 1024),
        Stage(4096, 4096, 9, 0.3, 0, 0.25, 1, 1024),
    ]
    assert plan(
        1040,
        1040,
        num_inference_steps=4,
        denoising_strength=0.5,
        stages=2,
        stage_strength=0.1,
        redraw="extrapolated",
    ) == [Stage(512, 512, 4, 0.5, 0, 1.0, 2, 0), Stage(1040, 1040, 1, 0.1, 0, 1.0, 2, 0)]


@pytest.mark.parametrize("redraw", REFINEMENTS)
def test_what_is_generated_from_noise_alone_is_generated_as_published(redraw):
    assert plan(2048, 2048, stage_strength=0.3, redraw=redraw) == [
        Stage(2048, 2048, 30, 1.0, 0, 1.0, 2, 0)
    ]


def test_more_stages_than_the_size_has_are_rejected():
    with pytest.raises(ValueError, match="stages is 6; expected 1 to 5 for 512 x 256"):
        plan(256, 512, (128, 128), stages=6)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("stages", 0, "stages is 0; expected a whole number from 1 to 8"),
        ("stage_strength", 0.0, "stage_strength is 0.0; expected a number above 0 to 1"),
        ("redraw", "twice", "redraw is 'twice'; expected one of interpolated, tiled, extrapolated"),
    ],
)
def test_settings_of_stages_that_do_not_fit_are_rejected(pipe, name, value, message):
    for attempt in (lambda: checked(name, value), lambda: pipe(PROMPT, **{name: value})):
        with pytest.raises(ValueError, match=message):
            attempt()


@pytest.mark.parametrize(
    "height, width, window, step",
    [(192, 192, 96, 16), (208, 96, 96, 16), (4096, 3072, 1024, 16), (640, 2560, 640, 320)],
)
def test_windows_cover_the_image_and_share_a_quarter(height, width, window, step):
    covered = np.zeros((height, width), int)
    for rows, columns in windows(height, width, window, step):
        assert (
            rows.start % step == columns.start % step == 0
            and rows.stop <= height
            and columns.stop <= width
        )
        assert (rows.stop - rows.start, columns.stop - columns.start) == (
            min(window, height),
            min(window, width),
        )
        covered[rows, columns] += 1
    assert covered.min() == 1
    for side in (height, width):
        starts = sorted({part.start for pair in windows(side, side, window, step) for part in pair})
        assert all(
            before + window - after >= window // 4 - step
            for before, after in zip(starts, starts[1:])
        )


def test_windows_are_blended_by_how_far_inside_a_pixel_is():
    x, seen = torch.randn(2, 3, 32, 56), []

    def add_own_number(part):
        seen.append(part)
        return part + len(seen)

    out = by_windows(add_own_number, x, 32, 8)
    places = [columns.start for _, columns in windows(32, 56, 32, 8)]
    assert places == [0, 24] and torch.equal(seen[1], x[..., 24:])
    depth = np.array(
        [
            [
                (
                    min(column - start + 1, start + 32 - column, 8)
                    if start <= column < start + 32
                    else 0
                )
                for column in range(56)
            ]
            for start in places
        ]
    )
    expected = x + torch.tensor((depth * [[1], [2]]).sum(0) / depth.sum(0), dtype=torch.float32)
    torch.testing.assert_close(out, expected)


def test_positions_can_be_squeezed():
    axes, cpu = (16, 8, 8), torch.device("cpu")
    small, large = (
        rope_of_image(4, 8, (1.0, 1.0), (0.0, 0.0), 32, axes, cpu)[:32],
        rope_of_image(8, 16, (0.5, 0.5), (0.0, 0.0), 32, axes, cpu)[:128],
    )
    assert torch.equal(large.unflatten(0, (8, 16))[::2, ::2], small.unflatten(0, (4, 8)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "redraw, guidance, attention",
    [(INTERPOLATED, 1.0, "local"), (TILED, 0.0, "local"), (EXTRAPOLATED, 0.0, "whole")],
)
def test_a_stage_redraws_the_one_before_it_enlarged(pipe, monkeypatch, redraw, guidance, attention):
    real, sides = kernels.attend_in_neighbourhoods, set()

    def recorded(attend, *given):
        sides.add(given[-1].side)
        return real(attend, *given)

    monkeypatch.setattr(kernels, "attend_in_neighbourhoods", recorded)
    calls = []
    drawn = pipe(
        PROMPT,
        stages=2,
        stage_strength=0.5,
        height=192,
        width=144,
        redraw=redraw,
        stage_cfg_scale=guidance,
        stage_attention=attention,
        callback=lambda *told: calls.append(told[:2]),
        **FEW,
    )
    first = pipe(PROMPT, height=96, width=64, **FEW)
    enlarged = first.resize((144, 192), Image.Resampling.LANCZOS)
    again = pipe(
        PROMPT,
        input_image=enlarged,
        denoising_strength=0.5,
        redraw=redraw,
        cfg_scale=guidance or None,
        stage_attention=attention,
        **{**FEW, "num_inference_steps": 3},
    )
    assert np.abs(np.asarray(drawn, int) - np.asarray(again)).max() <= 1 and drawn.size == (
        144,
        192,
    )
    assert calls == [(done, 9) for done in range(9)]
    assert sides == ({6} if redraw == INTERPOLATED else set())  # the trained 96 pixels


OLDER = {"squeezed": "interpolated", "windows": "tiled", "whole": "extrapolated"}


@pytest.mark.parametrize("before, now", OLDER.items())
def test_older_words_of_redraw_still_work(tmp_path, before, now):
    """In flags and tables, and in the record of an image that an older program generated."""
    assert checked("redraw", before) == now
    save_image(Image.new("RGB", (16, 16)), tmp_path / "old.png", {"redraw": before})
    assert is_generated(tmp_path / "old.png", {"redraw": now})
    with pytest.raises(ValueError, match="generated with other settings .redraw"):
        is_generated(
            tmp_path / "old.png", {"redraw": next(each for each in REFINEMENTS if each != now)}
        )


@pytest.mark.slow
def test_each_way_draws_another_image(pipe):
    start = Image.new("RGB", (192, 192), (40, 80, 225))
    drawn = {
        pipe(PROMPT, input_image=start, denoising_strength=0.5, redraw=redraw, **FEW).tobytes()
        for redraw in REFINEMENTS
    }
    assert len(drawn) == 3


@pytest.mark.parametrize(
    "redraw, told", [(INTERPOLATED, False), (TILED, False), (EXTRAPOLATED, True)]
)
def test_a_redrawing_beyond_the_table_of_positions_is_told(redraw, told):
    stages = plan(
        1600, 1600, (96, 96), num_inference_steps=4, denoising_strength=0.2, redraw=redraw
    )
    assert ("Set redraw to tiled" in (misfit(stages, (96, 96)) or "")) == told


def test_inpainting_in_stages_keeps_the_image(pipe):
    image = Image.effect_noise((192, 192), 60).convert("RGB")
    mask = Image.new("L", (192, 192), 0)
    mask.paste(255, (96, 0, 192, 192))
    drawn = np.asarray(pipe(PROMPT, input_image=image, inpaint_mask=mask, stages=2, **FEW))
    assert (drawn[:, :96] == np.asarray(image)[:, :96]).all() and (
        drawn[:, 96:] != np.asarray(image)[:, 96:]
    ).mean() > 0.9


@pytest.mark.parametrize(
    "size, stages, told",
    [
        ((192, 192), 1, "in 2 stages"),
        ((384, 384), 1, "in 3 stages"),
        ((384, 384), 2, "in 3 stages"),
        ((32, 32), 1, "Generate at 96 x 96"),
        ((16, 1152), 1, "nearer to a square"),
        ((96, 128), 1, None),
    ],
)
def test_sizes_far_from_the_trained_one_are_told(pipe, size, stages, told):
    class Enough(Exception):
        pass

    def stop(*_):
        raise Enough

    with warnings.catch_warnings(record=True) as seen, pytest.raises(Enough):
        warnings.simplefilter("always")
        pipe(PROMPT, height=size[0], width=size[1], stages=stages, callback=stop, **FEW)
    assert [told in str(each.message) for each in seen] == ([True] if told else [])
