"""Schedules and trajectories against recorded numbers of the published pipeline; the solvers
against exact solutions."""

import math

import pytest
import torch
from comfyui_l2p.l2p_core.flow import (
    SOLVERS,
    ab2,
    euler,
    guided_velocity,
    inpaint_velocity,
    schedule,
)
from comfyui_l2p.l2p_core.images import to_levels, to_pixels
from comfyui_l2p.l2p_core.pipeline import draw_noise
from comfyui_l2p.l2p_core.settings import Settings
from helpers import rms


@pytest.mark.parametrize("steps", [1, 4, 8, 30])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_schedule_is_the_published(golden, steps, strength):
    recorded = golden("sampling_fp32")
    sigmas = schedule(steps, strength)
    torch.testing.assert_close(
        sigmas[:-1],
        recorded[f"scheduler.steps{steps}.strength{strength}.sigmas"],
        atol=5e-7,
        rtol=0,
    )
    assert sigmas[-1] == 0


@pytest.mark.parametrize("arguments", [(0,), (4, 0.0), (4, 1.1), (4, 1.0, 0.0)])
def test_a_schedule_that_is_none_is_rejected(arguments):
    with pytest.raises(ValueError, match="expected at least 1 step"):
        schedule(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64x128", "64x48"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("time", ["t_fp32", "t_bf16"])
def test_trajectory_is_the_published(golden, tiny_model, size, scale, time):
    recorded = golden("sampling_fp32")
    key = f"traj.{size}.steps4.cfg{scale}.{time}."
    seen = []
    velocity = guided_velocity(
        tiny_model,
        [recorded["input.prompt.7"]],
        [recorded["input.negative.3"]],
        scale,
        bf16_rounding=time == "t_bf16",
    )

    def recording(x, sigma):
        seen.append(x)
        return velocity(x, sigma)

    seen.append(euler(recording, recorded[f"input.noise.{size}.seed42"], schedule(4)))
    if key + "latents_after_step" in recorded:
        torch.testing.assert_close(
            torch.cat(seen[1:]), recorded[key + "latents_after_step"], atol=1e-4, rtol=0
        )
    else:
        torch.testing.assert_close(seen[-1], recorded[key + "final_latents"], atol=1e-4, rtol=0)
    assert (to_levels(seen[-1])[0].int() - recorded[key + "image_u8"].int()).abs().max() <= 1


@pytest.mark.slow
def test_bf16_trajectory_is_the_published_within_rounding(golden, tiny_weights, tiny_model):
    recorded, noise = golden("sampling_bf16"), golden("sampling_fp32")["input.noise.64x128.seed42"]
    model = type(tiny_model)(tiny_model.config).to(torch.bfloat16)
    model.load_state_dict(tiny_weights)
    velocity = guided_velocity(
        model, [recorded["input.prompt.7"]], [recorded["input.negative.3"]], 2.0, bf16_rounding=True
    )
    x = euler(velocity, noise, schedule(4))
    key = "traj.64x128.steps4.cfg2.0."
    last = recorded[key + "latents_after_step"][-1:]
    assert x.dtype == torch.float32 and rms(x - last, last) < 0.015
    assert (to_levels(x)[0].int() - recorded[key + "image_u8"].int()).abs().max() <= 16


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64x128", "64x48"])
@pytest.mark.parametrize(
    "rounding, dtype", [("px_fp32_t_fp32", torch.float32), ("px_bf16_t_bf16", torch.bfloat16)]
)
def test_image_to_image_is_the_published(golden, tiny_model, size, rounding, dtype):
    from PIL import Image

    recorded = golden("sampling_fp32")
    key = f"i2i.{size}.steps4.cfg2.0.strength0.6.{rounding}."
    sigmas = schedule(4, 0.6)
    image = to_pixels(Image.fromarray(recorded[f"input.i2i.image.{size}"].numpy()), dtype).float()
    start = (1 - sigmas[0]) * image + sigmas[0] * recorded[f"input.noise.{size}.seed42"]
    torch.testing.assert_close(start, recorded[key + "initial_latents"], atol=1e-6, rtol=0)
    velocity = guided_velocity(
        tiny_model,
        [recorded["input.prompt.7"]],
        [recorded["input.negative.3"]],
        2.0,
        bf16_rounding=dtype == torch.bfloat16,
    )
    x = euler(velocity, start, sigmas)
    last = recorded.get(
        key + "final_latents", recorded.get(key + "latents_after_step", torch.empty(1))[-1:]
    )
    torch.testing.assert_close(x, last, atol=1e-4, rtol=0)
    assert (to_levels(x)[0].int() - recorded[key + "image_u8"].int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(64, 128), (64, 48)])
def test_noise_of_a_seed_is_the_published(golden, size):
    recorded = golden("sampling_fp32")[f"input.noise.{size[0]}x{size[1]}.seed42"]
    assert torch.equal(draw_noise((1, 3, *size), 42), recorded)
    assert torch.equal(draw_noise((2, 3, *size), [7, 42])[1:], recorded)


def test_noise_of_a_batch_is_comfyuis():
    torch.manual_seed(
        5
    )  # comfy/sample.py, prepare_noise: the global CPU generator, one draw for the batch
    assert torch.equal(draw_noise((3, 3, 32, 32), 5), torch.randn(3, 3, 32, 32))


def test_guidance_of_one_asks_once(tiny_model):
    asked = []
    handle = tiny_model.register_forward_hook(lambda *_: asked.append(1))
    caption, negative = torch.randn(5, 64), torch.randn(9, 64)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        one = guided_velocity(tiny_model, [caption], [negative], 1.0)(x, 0.5)
        assert len(asked) == 1
        plus, minus = (-tiny_model(x, torch.tensor([0.5]), [each]) for each in (caption, negative))
        three = guided_velocity(tiny_model, [caption], [negative], 3.0)(x, 0.5)
    handle.remove()
    assert torch.equal(one, plus)
    torch.testing.assert_close(three, minus + 3 * (plus - minus))


@pytest.mark.slow
def test_the_norm_of_the_guided_velocity_can_be_limited(tiny_model, golden):
    """Image by image, to a multiple of the norm that the prompt's own velocity has."""
    recorded = golden("sampling_fp32")
    prompts = [recorded["input.prompt.7"]] * 2
    negatives = [recorded["input.negative.3"]] * 2
    x = (
        torch.stack([recorded["input.noise.64x48.seed42"][0]] * 2)
        * torch.tensor([1.0, 3.0])[:, None, None, None]
    )

    def velocity(scale, limit):
        settings = Settings(cfg_normalization=limit)
        return guided_velocity(tiny_model, prompts, negatives, scale, settings)(x, 0.5)

    with torch.no_grad():
        own, free, limited, wide = (
            velocity(*each) for each in ((1.0, 0.0), (30.0, 0.0), (30.0, 1.02), (30.0, 100.0))
        )
    for i in range(2):
        assert free[i].norm() > 1.02 * own[i].norm(), "guidance is too weak to be limited"
        torch.testing.assert_close(limited[i], free[i] * 1.02 * own[i].norm() / free[i].norm())
    torch.testing.assert_close(wide, free)


def circling(x, sigma):
    """A flow whose solution is known: dx/dsigma = 3 cos(3 sigma), so x(0) = x(1) - sin 3."""
    return torch.full_like(x, 3 * math.cos(3 * sigma))


@pytest.mark.parametrize("name, order", [("euler", 1), ("ab2", 2)])
def test_solver_converges_at_its_order(name, order):
    def error(steps):
        x = SOLVERS[name](
            circling, torch.zeros(1, 3, 1, 1, dtype=torch.float64), schedule(steps).double()
        )
        return abs(x[0, 0, 0, 0].item() + math.sin(3))

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("solver", [euler, ab2])
def test_kept_pixels_come_back(solver):
    torch.manual_seed(0)
    image, noise = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 3, 16, 16)
    mask = (torch.rand(1, 1, 16, 16) > 0.5).float()
    sigmas = schedule(7, 0.8)
    start = (1 - sigmas[0]) * image + sigmas[0] * noise
    end = solver(inpaint_velocity(lambda x, sigma: torch.sin(x), mask, image, noise), start, sigmas)
    kept = (mask == 0).expand_as(image)
    torch.testing.assert_close(end[kept], image[kept], atol=1e-5, rtol=0)
    assert (end[~kept] - image[~kept]).abs().mean() > 0.1


def test_callback_sees_every_step_and_can_stop():
    seen = []

    def stop_at_two(done, steps, image):
        seen.append((done, steps, image.shape))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        euler(circling, torch.zeros(1, 3, 4, 4), schedule(5), stop_at_two)
    assert seen == [(done, 5, (1, 3, 4, 4)) for done in range(3)]
