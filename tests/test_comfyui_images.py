"""ComfyUI's server and the library generate the same pixels, to the level that
ComfyUI's Save Image cuts off."""

import io
import json

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.shapes.parse import complete
from comfyui_l2p.l2p_core.shapes.scenes import test_scenes as held_out_scenes
from comfyui_l2p.l2p_core.shapes.world import PLACES_WORLD
from PIL import Image
from real_comfyui import Rejected

BUNDLED = "L2P shapes (bundled small model)"
PROMPT = "a large red circle on a blue background, left"


@pytest.fixture(scope="module")
def pipe():
    return L2PPipeline.from_pretrained(torch_dtype=torch.float32)


@pytest.fixture(scope="module")
def image(pipe):
    """An image to start from."""
    return pipe("a small green square on a yellow background, top", seed=1, num_inference_steps=6)


@pytest.fixture(scope="module")
def mask():
    out = Image.new("L", (96, 96), 0)
    out.paste(255, (0, 48, 96, 96))
    return out


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def graph(prompt: str | list = PROMPT, negative: str = "", **sampler) -> dict:
    """Text to image with the bundled model. sampler: inputs of the L2P KSampler that differ from
    the published ones."""
    return {
        "model": {
            "class_type": "L2PCheckpointLoader",
            "inputs": {"checkpoint": BUNDLED, "weight_dtype": "float32", "convrot": "as marked"},
        },
        "encoder": {
            "class_type": "L2PTextEncoderLoader",
            "inputs": {"text_encoder": BUNDLED, "device": "default"},
        },
        "prompt": {
            "class_type": "L2PTextEncode",
            "inputs": {"clip": ["encoder", 0], "prompt": prompt, "negative_prompt": negative},
        },
        "sampler": {
            "class_type": "L2PKSampler",
            "inputs": {
                "model": ["model", 0],
                "positive": ["prompt", 0],
                "negative": ["prompt", 1],
                "width": 96,
                "height": 96,
                "batch_size": 1,
                "seed": 7,
                "steps": 6,
                "cfg": 2.0,
                "sampler_name": "euler",
                "scheduler": "l2p",
                "shift": 3.0,
                "denoise": 1.0,
                **sampler,
            },
        },
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["sampler", 0], "filename_prefix": "l2p"},
        },
    }


def levels(image: Image.Image | bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image).astype(
        int
    )


def assert_same(found: list[bytes], expected: list[Image.Image]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        assert np.abs(levels(ours) - levels(theirs)).max() <= 1


@pytest.mark.parametrize(
    "cfg, negative, width, height, steps",
    [(2.0, "", 96, 96, 6), (1.0, "", 96, 96, 6), (3.5, "a star", 128, 80, 4)],
)
def test_text_to_image(comfyui_server, pipe, cfg, negative, width, height, steps):
    expected = pipe(
        PROMPT,
        negative,
        cfg_scale=cfg,
        num_inference_steps=steps,
        width=width,
        height=height,
        seed=7,
    )
    assert_same(
        comfyui_server.run(
            graph(negative=negative, cfg=cfg, steps=steps, width=width, height=height)
        ),
        [expected],
    )


def test_a_batch_and_another_shift(comfyui_server, pipe):
    expected = pipe(PROMPT, num_inference_steps=4, seed=7, shift=5.0, num_images=2)
    assert_same(comfyui_server.run(graph(batch_size=2, steps=4, shift=5.0)), expected)


def test_our_own_solver(comfyui_server, pipe):
    expected = pipe(PROMPT, num_inference_steps=8, seed=7, sampler="ab2", shift=2.0)
    assert_same(comfyui_server.run(graph(sampler_name="ab2", steps=8, shift=2.0)), [expected])


def test_image_to_image(comfyui_server, pipe, image):
    expected = pipe(
        PROMPT, input_image=image, denoising_strength=0.6, num_inference_steps=6, seed=7
    )
    request = graph(denoise=0.6, image=["image", 0])
    request["image"] = {
        "class_type": "LoadImage",
        "inputs": {"image": comfyui_server.upload("start.png", png(image))},
    }
    assert_same(comfyui_server.run(request), [expected])


@pytest.mark.parametrize(
    "size, drawn", [((75, 110), (80, 112)), ((400, 200), (192, 96)), (None, (96, 96))]
)
def test_no_size_is_that_of_the_image(comfyui_server, size, drawn):
    """In multiples of 16, of no more than twice the model's 96 x 96 pixels."""
    request = graph(width=0, height=0, steps=1)
    if size:
        request["image"] = {
            "class_type": "EmptyImage",
            "inputs": {"width": size[0], "height": size[1], "batch_size": 1, "color": 0xFFFFFF},
        }
        request["sampler"]["inputs"].update(image=["image", 0], denoise=0.5)
    (found,) = comfyui_server.run(request)
    assert Image.open(io.BytesIO(found)).size == drawn


def test_each_image_of_a_batch_is_redrawn(comfyui_server, pipe, image):
    request = graph(denoise=0.1, image=["both", 0], cfg=1.0, steps=2)
    request["image"] = {
        "class_type": "LoadImage",
        "inputs": {"image": comfyui_server.upload("start.png", png(image))},
    }
    request["white"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 96, "height": 96, "batch_size": 1, "color": 0xFFFFFF},
    }
    request["both"] = {
        "class_type": "ImageBatch",
        "inputs": {"image1": ["image", 0], "image2": ["white", 0]},
    }
    first, second = comfyui_server.run(request)
    from_image, from_white = (
        [np.abs(levels(drawn) - start).mean() for drawn in (first, second)]
        for start in (levels(image), 255)
    )
    assert from_image[0] < from_image[1] / 3 and from_white[1] < from_white[0] / 3


@pytest.mark.parametrize("sampler", ["euler", "uni_pc"])
def test_inpaint_keeps_what_is_not_masked(comfyui_server, pipe, image, mask, sampler):
    expected = pipe(PROMPT, input_image=image, inpaint_mask=mask, num_inference_steps=6, seed=7)
    request = graph(image=["image", 0], mask=["mask", 0], sampler_name=sampler)
    request["image"] = {
        "class_type": "LoadImage",
        "inputs": {"image": comfyui_server.upload("start.png", png(image))},
    }
    request["mask"] = {
        "class_type": "LoadImageMask",
        "inputs": {
            "image": comfyui_server.upload("mask.png", png(mask.convert("RGB"))),
            "channel": "red",
        },
    }
    found = comfyui_server.run(request)
    if sampler == "euler":
        assert_same(found, [expected])
    assert (levels(found[0]) == levels(image))[:48].all()


@pytest.mark.parametrize(
    "redraw, guidance, attention",
    [("interpolated", 1, "local"), ("tiled", 0, "whole"), ("extrapolated", 0, "whole")],
)
def test_stages(comfyui_server, pipe, redraw, guidance, attention):
    expected = pipe(
        PROMPT,
        num_inference_steps=6,
        seed=7,
        width=192,
        height=144,
        stages=2,
        stage_strength=0.5,
        redraw=redraw,
        stage_cfg_scale=guidance,
        stage_attention=attention,
    )
    request = graph(width=192, height=144, stage_options=["stages", 0])
    options = {"stages": 2, "stage_denoise": 0.5, "redraw": redraw, "stage_cfg": guidance}
    inputs = {**options, "stage_attention": attention}
    request["stages"] = {"class_type": "L2PStages", "inputs": inputs}
    assert_same(comfyui_server.run(request), [expected])


def test_inpaint_in_stages(comfyui_server, pipe, image, mask):
    image, mask = (
        image.resize((192, 192), Image.Resampling.NEAREST),
        mask.resize((192, 192), Image.Resampling.NEAREST),
    )
    request = graph(image=["image", 0], mask=["mask", 0], width=192, height=192, stages=2)
    request["image"] = {
        "class_type": "LoadImage",
        "inputs": {"image": comfyui_server.upload("large.png", png(image))},
    }
    request["mask"] = {
        "class_type": "LoadImageMask",
        "inputs": {
            "image": comfyui_server.upload("large_mask.png", png(mask.convert("RGB"))),
            "channel": "red",
        },
    }
    (found,) = comfyui_server.run(request)
    assert (levels(found) == levels(image))[:96].all()


def test_every_level_survives_the_way_through_a_pixel_latent(comfyui_server):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    (found,) = comfyui_server.run(
        {
            "image": {
                "class_type": "LoadImage",
                "inputs": {"image": comfyui_server.upload("ramp.png", png(ramp))},
            },
            "latent": {"class_type": "L2PImageToLatent", "inputs": {"image": ["image", 0]}},
            "back": {"class_type": "L2PLatentToImage", "inputs": {"latent": ["latent", 0]}},
            "save": {
                "class_type": "SaveImage",
                "inputs": {"images": ["back", 0], "filename_prefix": "ramp"},
            },
        }
    )
    assert (levels(found) == levels(ramp)).all()


def test_a_list_of_prompts_draws_each(comfyui_server, pipe):
    """The held-out prompts, as the score asks them: what the library's images score, ComfyUI's
    do."""
    prompts = [scene.caption() for scene in held_out_scenes(8)]
    request = graph(["prompts", 0], steps=4)
    request["prompts"] = {
        "class_type": "L2PPromptList",
        "inputs": {"prompts": "\n".join([*prompts, "", "  "])},
    }
    assert_same(
        comfyui_server.run(request),
        [pipe(prompt, num_inference_steps=4, seed=7) for prompt in prompts],
    )


def test_comfyuis_own_nodes_draw_the_same(comfyui_server, pipe):
    """Load Diffusion Model, SamplerCustom with the exact schedule, and the pixel VAE, whose default
    dtype is kept to float32."""
    import shutil

    from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL

    shutil.copy(
        BUNDLED_MODEL / "transformer.safetensors",
        comfyui_server.models / "diffusion_models" / "shapes.safetensors",
    )
    request = graph()
    request |= {
        "model": {
            "class_type": "UNETLoader",
            "inputs": {"unet_name": "shapes.safetensors", "weight_dtype": "default"},
        },
        "empty": {
            "class_type": "EmptyL2PLatentImage",
            "inputs": {"size": "custom", "width": 96, "height": 96, "batch_size": 1},
        },
        "sigmas": {
            "class_type": "L2PScheduler",
            "inputs": {"steps": 6, "shift": 3.0, "denoise": 1.0},
        },
        "euler": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "sampler": {
            "class_type": "SamplerCustom",
            "inputs": {
                "model": ["model", 0],
                "add_noise": True,
                "noise_seed": 7,
                "cfg": 2.0,
                "positive": ["prompt", 0],
                "negative": ["prompt", 1],
                "sampler": ["euler", 0],
                "sigmas": ["sigmas", 0],
                "latent_image": ["empty", 0],
            },
        },
        "decode": {"class_type": "L2PLatentToImage", "inputs": {"latent": ["sampler", 0]}},
        "save": {
            "class_type": "SaveImage",
            "inputs": {"images": ["decode", 0], "filename_prefix": "l2p"},
        },
    }
    assert_same(comfyui_server.run(request), [pipe(PROMPT, num_inference_steps=6, seed=7)])


@pytest.mark.parametrize(
    "scheduler, sampler", [("simple", "dpmpp_2m"), ("beta", "euler_ancestral"), ("normal", "deis")]
)
def test_comfyuis_samplers_and_schedulers_draw_near(comfyui_server, pipe, scheduler, sampler):
    expected = levels(pipe(PROMPT, num_inference_steps=12, seed=7))
    found = levels(
        comfyui_server.run(graph(steps=12, scheduler=scheduler, sampler_name=sampler))[0]
    )
    assert found.std() > 10  # an image, neither flat nor NaN
    if sampler != "euler_ancestral":  # which adds noise of its own
        assert np.abs(found - expected).mean() < 20


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 100}, "multiple"),
        ({"denoise": 0.5}, "needs an image"),
        ({"mask": ["blank", 0]}, "needs an image"),
        ({"image": ["white", 0], "mask": ["black", 0]}, "mask is empty"),
    ],
)
def test_what_does_not_fit_is_explained(comfyui_server, change, message):
    request = graph(**change)
    request["blank"] = {
        "class_type": "SolidMask",
        "inputs": {"value": 1.0, "width": 96, "height": 96},
    }
    request["black"] = {
        "class_type": "SolidMask",
        "inputs": {"value": 0.0, "width": 96, "height": 96},
    }
    request["white"] = {
        "class_type": "EmptyImage",
        "inputs": {"width": 96, "height": 96, "batch_size": 1, "color": 0xFFFFFF},
    }
    with pytest.raises(Rejected, match=message):
        comfyui_server.run(request)


def watch(server, request: dict, **extra) -> tuple[list[bytes], list[tuple[int, int]], dict]:
    """Run a graph as the page does. Returns the previews, the counts of steps, and what was saved.

    extra: what the page sends beside the graph."""
    websocket = pytest.importorskip("websocket")
    socket = websocket.create_connection(f"ws{server.url[4:]}/ws?clientId=preview", timeout=120)
    body = {"prompt": request, "client_id": "preview", "extra_data": extra}
    prompt_id = server.post("/prompt", body)["prompt_id"]
    shown, counted = [], []
    while True:
        message = socket.recv()
        if isinstance(message, bytes):
            shown.append(message)
            continue
        message = json.loads(message)
        if message["type"] == "progress" and message["data"]["node"] == "sampler":
            counted.append((message["data"]["value"], message["data"]["max"]))
        if (
            message["type"] in ("execution_success", "execution_error")
            and message["data"]["prompt_id"] == prompt_id
        ):
            break
    socket.close()
    return shown, counted, server.wait(prompt_id)["outputs"]["save"]["images"][0]


def test_the_preview_is_the_true_image(comfyui_server):
    """Without any preview setting: steps are counted, and what is shown before the last one is
    nearly what comes out."""
    steps = 8
    shown, counted, final = watch(comfyui_server, graph(steps=steps, seed=11))
    assert counted[-1] == (steps, steps) and len(counted) > 2
    assert len(shown) > 2
    first, last = (
        levels(message[message.index(b"\xff\xd8") :]) for message in (shown[0], shown[-1])
    )
    drawn = Image.open(io.BytesIO(comfyui_server.get("/view", **final)))
    final = levels(
        drawn.resize(last.shape[1::-1], Image.Resampling.LANCZOS)
    )  # ComfyUI enlarges small previews
    assert np.abs(last - final).mean() < np.abs(first - final).mean() / 2
    assert np.abs(last - final).mean() < 8  # JPEG, and the last step


def test_no_preview_is_shown_to_those_who_want_none(comfyui_server):
    shown, counted, _ = watch(comfyui_server, graph(steps=4, seed=12), preview_method="none")
    assert counted[-1] == (4, 4) and shown == []


@pytest.mark.parametrize("node", ["EasyCache", "LazyCache"])
def test_step_caches_of_comfyui_change_the_image_a_little(comfyui_server, node):
    """In float32, where a cache that adds to the sampler's own tensor would spoil the image."""
    plain = graph(steps=20)
    cached = graph(steps=20)
    cached["cache"] = {
        "class_type": node,
        "inputs": {
            "model": ["model", 0],
            "reuse_threshold": 0.05,
            "start_percent": 0.15,
            "end_percent": 0.95,
            "verbose": False,
        },
    }
    cached["sampler"]["inputs"]["model"] = ["cache", 0]
    (before,), (after,) = comfyui_server.run(plain), comfyui_server.run(cached)
    difference = np.abs(levels(before) - levels(after))
    assert 0 < difference.mean() < 8


def test_a_short_prompt_is_completed_for_the_bundled_model(comfyui_server, pipe):
    """Always in the same way: with seed 0, whatever the sampler's is."""
    prompt = "a red circle on a blue background"
    full = complete(prompt, PLACES_WORLD, 0)
    expected = pipe(full, num_inference_steps=6, seed=7)
    assert_same(comfyui_server.run(graph(prompt=prompt)), [expected])
    assert f"The bundled model reads: {full}" in comfyui_server.log.read_text()
