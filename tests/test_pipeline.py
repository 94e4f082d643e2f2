"""The whole path on the bundled model: the same pixels as its parts give by hand, and options that
do what they say."""

import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import CheckpointError, L2PConfig, L2PPipeline, L2PTransformer, load_model
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS
from comfyui_l2p.l2p_core.devices import default_dtype, threads_for
from comfyui_l2p.l2p_core.flow import euler, guided_velocity, schedule
from comfyui_l2p.l2p_core.images import to_images, to_pixels
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.settings import FIELDS
from comfyui_l2p.l2p_core.text import TextEncoder
from helpers import apart
from PIL import Image

PROMPT = "a large red circle on a blue background, left"
FEW = {"num_inference_steps": 3, "height": 64, "width": 48}


@pytest.fixture(scope="module")
def pipe():
    return L2PPipeline.from_pretrained(device="cpu", torch_dtype=torch.float32)


def levels(image):
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (64, 48, 3), dtype=np.uint8))


def test_a_image_is_what_the_parts_give_by_hand(pipe):
    drawn = pipe(prompt=PROMPT, negative_prompt="", cfg_scale=2.0, seed=7, rand_device="cpu", **FEW)
    encoder = TextEncoder.load(BUNDLED_MODEL, dtype=torch.float32)
    model = load_model(BUNDLED_MODEL / "transformer.safetensors", dtype=torch.float32)
    velocity = guided_velocity(model, [encoder.encode(PROMPT)], [encoder.encode("")], 2.0)
    noise = torch.randn((1, 3, 64, 48), generator=torch.Generator().manual_seed(7))
    by_hand = to_images(euler(velocity, noise, schedule(3)))[0]
    assert isinstance(drawn, Image.Image) and drawn.size == (48, 64)
    assert apart(drawn, by_hand) <= 1


@pytest.mark.slow
def test_a_small_model_computes_on_one_thread_and_gives_the_others_back(pipe, monkeypatch):
    seen = []

    def threads(*_):
        seen.append(torch.get_num_threads())
        if len(seen) == 3:
            raise InterruptedError

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        pipe(PROMPT, num_inference_steps=1, height=64, width=64, callback=threads)
        assert set(seen) == {1} and torch.get_num_threads() == 2
        with pytest.raises(InterruptedError):
            pipe(PROMPT, height=64, width=64, callback=threads)
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        pipe(PROMPT, num_inference_steps=1, height=64, width=64, callback=threads)
        assert seen[-1] == 2
    finally:
        torch.set_num_threads(before)
    with threads_for(10**10, torch.device("cpu")):
        assert torch.get_num_threads() == before


def test_the_default_dtype_suits_the_device_and_the_model():
    cpu, mps = torch.device("cpu"), torch.device("mps")
    assert L2PPipeline.from_pretrained(device="cpu", torch_dtype=None).dtype == torch.float32
    assert default_dtype(cpu, 6_000_000_000) == torch.bfloat16 == default_dtype(mps, 1000)


def test_defaults_are_the_checkpoints(pipe):
    assert pipe.defaults == (30, 2.0, 96, 96)
    seen = []
    with pytest.raises(InterruptedError):

        def stop(done, steps, image):
            seen.append((steps, tuple(image.shape)))
            raise InterruptedError

        pipe(PROMPT, callback=stop)
    assert seen == [(30, (1, 3, 96, 96))]


def test_complete_settings_leave_nothing_open_and_keep_the_order_of_records(pipe):
    record = asdict(pipe.complete({"prompt": PROMPT}))
    assert list(record) == list(FIELDS)
    assert None not in record.values()


@pytest.mark.parametrize("patch", [16, 64, 128, 160])
def test_defaults_of_large_patches_are_the_published(patch, write):
    model = L2PTransformer(
        L2PConfig(patch, 96, 3, 1, 1, 256, 64, decoder=PUBLISHED_DECODERS[patch])
    )
    pipe = L2PPipeline.from_pretrained(write(model.state_dict()))
    assert pipe.defaults == ((30, 2.0) if patch == 16 else (50, 4.0)) + (64 * patch, 64 * patch)


def test_several_prompts_are_drawn_as_each_alone(pipe):
    prompts, seeds = [PROMPT, "a star", ""], [1, 2, 3]
    together = pipe(prompts, seed=seeds, **FEW)
    for image, prompt, seed in zip(together, prompts, seeds, strict=True):
        assert abs(levels(image) - levels(pipe(prompt, seed=seed, **FEW))).max() <= 1


def test_num_images_draws_one_batch_from_one_seed(pipe):
    images = pipe(PROMPT, num_images=2, seed=5, **FEW)
    noise = torch.randn((2, 3, 64, 48), generator=torch.Generator().manual_seed(5))
    velocity = guided_velocity(
        pipe.transformer, [pipe.encode_prompt(PROMPT)] * 2, [pipe.encode_prompt("")] * 2, 2.0
    )
    by_hand = to_images(euler(velocity, noise, schedule(3)))
    assert max(apart(*pair) for pair in zip(images, by_hand, strict=True)) <= 1
    assert isinstance(pipe(PROMPT, num_images=1, seed=5, **FEW), list)


def test_no_seed_is_another_image_each_time(pipe):
    assert pipe(PROMPT, **FEW).tobytes() != pipe(PROMPT, **FEW).tobytes()


def test_encodings_serve_many_images_without_the_encoder(pipe):
    expected = pipe(PROMPT, seed=3, **FEW)
    features, negative = pipe.encode_prompt(PROMPT), pipe.encode_prompt("")
    pipe.unload_text_encoder()
    reused = pipe(prompt_embeds=features, negative_prompt_embeds=negative, seed=3, **FEW)
    assert apart(reused, expected) <= 1 and "text_encoder" not in vars(pipe)
    assert apart(pipe(PROMPT, seed=3, **FEW), expected) <= 1 and "text_encoder" not in vars(pipe)
    pipe("a prompt not seen before", seed=3, **FEW)
    assert "text_encoder" in vars(pipe)


def test_the_empty_negative_prompt_is_encoded_not_zeroed(pipe):
    encoded = pipe(PROMPT, seed=3, **FEW)
    zeroed = pipe(
        PROMPT, seed=3, negative_prompt_embeds=torch.zeros_like(pipe.encode_prompt("")), **FEW
    )
    assert abs(levels(encoded) - levels(zeroed)).max() > 1


@pytest.mark.slow
def test_a_start_image_shows_more_the_less_it_is_noised(pipe, photo):
    distances = [
        abs(
            levels(
                pipe(
                    PROMPT,
                    seed=1,
                    input_image=photo,
                    denoising_strength=strength,
                    num_inference_steps=3,
                )
            )
            - levels(photo)
        ).mean()
        for strength in (0.02, 0.3, 1.0)
    ]
    assert distances[0] < distances[1] < distances[2]
    assert (
        apart(pipe(PROMPT, seed=1, input_image=photo, **FEW), pipe(PROMPT, seed=1, **FEW)) <= 1
    ), "at strength 1 none is left"


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["euler", "ab2"])
def test_masked_pixels_are_kept_exactly(pipe, photo, sampler, strength):
    mask = np.zeros((64, 48), dtype=np.uint8)
    mask[20:40, 10:30] = 255
    drawn = pipe(
        PROMPT,
        seed=1,
        input_image=photo,
        inpaint_mask=Image.fromarray(mask),
        sampler=sampler,
        denoising_strength=strength,
        num_inference_steps=4,
    )
    kept = mask == 0
    assert (levels(drawn)[kept] == levels(photo)[kept]).all()
    assert (levels(drawn)[~kept] != levels(photo)[~kept]).mean() > 0.5


def test_misfitting_images_are_resized_and_it_is_said(pipe, photo):
    with pytest.warns(UserWarning, match="input_image is 48 x 64 and was resized to 96 x 32"):
        assert pipe(PROMPT, input_image=photo, height=32, width=96, num_inference_steps=1).size == (
            96,
            32,
        )
    with pytest.warns(UserWarning, match="input_image is 50 x 61 and was resized to 48 x 64"):
        assert pipe(PROMPT, input_image=photo.resize((50, 61)), num_inference_steps=1).size == (
            48,
            64,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe(PROMPT, input_image=photo, num_inference_steps=1).size == (48, 64)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"height": 100}, "height is 100.*96 and 112"),
        ({"sampler": "dpm"}, "sampler is 'dpm'; expected one of euler, ab2"),
        ({"denoising_strength": 0}, "denoising_strength is 0; expected a number above 0 to 1"),
        ({"num_images": 0}, "nothing to generate"),
        ({"seed": [1, 2]}, "2 seeds are given for 1 images"),
        ({"prompt_embeds": torch.ones(2, 96)}, "either prompt or prompt_embeds"),
        ({"cfg_scale": float("nan")}, "cfg_scale is nan"),
        ({"shift": float("nan")}, "shift is nan; expected a number above 0 to 100"),
        ({"rand_device": "abacus"}, "device abacus can't be used"),
        ({"inpaint_mask": Image.new("L", (8, 8))}, "inpaint_mask is given without input_image"),
    ],
)
def test_options_that_do_not_fit_are_rejected(pipe, arguments, said):
    with pytest.raises(ValueError, match=said):
        pipe(PROMPT, **{**FEW, **arguments})


@pytest.mark.parametrize("stages", [1, 2])
def test_a_image_of_nan_is_rejected(write, stages):
    weights = {
        name: tensor.clone()
        for name, tensor in (
            load_model(BUNDLED_MODEL / "transformer.safetensors").state_dict().items()
        )
    }
    weights["local_decoder.out_conv.weight"] *= 1e30
    pipe = L2PPipeline.from_pretrained(
        write(weights), text_encoder=BUNDLED_MODEL, torch_dtype=torch.float32
    )
    with pytest.raises(ValueError, match="the image came out as NaN"):
        pipe(PROMPT, stages=stages, **FEW)


@pytest.mark.parametrize("rounding, dtype", [(False, torch.float32), (True, torch.bfloat16)])
def test_published_rounding_reaches_the_start_image(pipe, photo, rounding, dtype):
    """At strength 1e-6 the image itself comes back, in float32 or as bfloat16 makes it (up to
    0.002 off)."""
    seen = []
    pipe(
        PROMPT,
        seed=1,
        input_image=photo,
        denoising_strength=1e-6,
        num_inference_steps=1,
        bf16_rounding=rounding,
        callback=lambda done, steps, image: seen.append(image),
    )
    torch.testing.assert_close(seen[0], to_pixels(photo, dtype).float(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_dropped_pipeline_leaves_memory_at_once():
    import gc
    import weakref

    pipe = L2PPipeline.from_pretrained(device="cpu")
    pipe(PROMPT, **FEW)
    model = weakref.ref(pipe.transformer)
    gc.disable()
    try:
        del pipe
        assert model() is None
    finally:
        gc.enable()


def test_a_text_encoder_of_another_width_is_rejected(tiny_weights, write):
    pipe = L2PPipeline.from_pretrained(
        write(tiny_weights), text_encoder=BUNDLED_MODEL, torch_dtype=torch.float32
    )
    with pytest.raises(
        ValueError, match=r"expected \(length, 64\).*text encoder this checkpoint was trained with"
    ):
        pipe(PROMPT, **FEW)


def test_a_checkpoint_that_can_not_be_used_is_rejected_at_once(tiny_weights, write):
    with pytest.raises(CheckpointError, match="it is a trained part"):
        L2PPipeline.from_pretrained(
            write(
                {name: tensor for name, tensor in tiny_weights.items() if "layers.1." not in name}
            )
        )


def test_blocks_that_are_streamed_draw_the_same(pipe):
    streamed = L2PPipeline.from_pretrained(torch_dtype=torch.float32, offload=True, device="cpu")
    assert apart(streamed(PROMPT, seed=7, **FEW), pipe(PROMPT, seed=7, **FEW)) <= 1
    assert all(hasattr(block, "_diffusers_hook") for block in streamed.transformer.layers)
