"""The transformer against recorded numbers of the published program. Tolerances:
tests/golden/README.md."""

import pytest
import torch
from comfyui_l2p.l2p_core import model
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, L2PConfig
from comfyui_l2p.l2p_core.meter import Meter, shapes_only
from comfyui_l2p.l2p_core.model import Hooks, L2PTransformer, rope_of_image, rope_of_prompt
from golden import recipe
from helpers import rms

CASES = [
    f"{size}.cap{length}.t{t}"
    for size in ("64x48", "80x80", "64x128")
    for length in (7, 40)
    for t in ("0.0", "0.3", "0.97")
] + ["128x128.cap40.t0.3"]
INTERMEDIATES = ["64x128.cap7.t0.3", "80x80.cap40.t0.3"]


def inputs(recorded, case):
    size, caption = case.split(".")[0], case.split(".")[1].removeprefix("cap")
    return recorded[f"input.image.{size}"], [recorded[f"input.caption.{caption}"]]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_fp32_output_and_features_are_the_published(golden, tiny_model, case):
    recorded = golden("dit_fp32")
    image, captions = inputs(recorded, case)
    t = recorded[f"case.{case}.t"]
    with torch.no_grad():
        torch.testing.assert_close(
            tiny_model.features(image, t, captions),
            recorded[f"case.{case}.feature_map"],
            atol=5e-4,
            rtol=0,
        )
        torch.testing.assert_close(
            tiny_model(image, t, captions), recorded[f"case.{case}.output"], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("case", INTERMEDIATES)
def test_fp32_intermediates_are_the_published(golden, tiny_model, case):
    recorded = golden("dit_fp32")
    image, captions = inputs(recorded, case)
    seen = {}
    watched = {
        "t_embed": (tiny_model.t_embedder, 2e-5),
        "local_decoder.bottleneck": (tiny_model.local_decoder.bottleneck, 5e-4),
    }
    watched |= {
        f"noise_refiner.{i}": (block, 2e-4) for i, block in enumerate(tiny_model.noise_refiner)
    }
    watched |= {
        f"context_refiner.{i}": (block, 3e-5) for i, block in enumerate(tiny_model.context_refiner)
    }
    watched |= {f"layers.{i}": (block, 2e-4) for i, block in enumerate(tiny_model.layers)}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
        for name, (module, _) in watched.items()
    ]
    for name, module in (
        ("x_embed", tiny_model.noise_refiner[0]),
        ("cap_embed", tiny_model.context_refiner[0]),
    ):
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.update({name: args[0]})
            )
        )
        watched[name] = module, 1e-5
    try:
        with torch.no_grad():
            tiny_model(image, recorded[f"inter.{case}.t"], captions)
    finally:
        for hook in hooks:
            hook.remove()
    for name, (_, tolerance) in watched.items():
        torch.testing.assert_close(
            seen[name],
            recorded[f"inter.{case}.{name}"],
            atol=tolerance,
            rtol=0,
            msg=lambda m: f"{name}: {m}",
        )


@pytest.mark.parametrize("case", INTERMEDIATES)
def test_rotations_are_the_published(golden, tiny_model, case):
    recorded = golden("dit_fp32")
    h, w = (int(side) // 16 for side in case.split(".")[0].split("x"))
    caption = recorded[f"inter.{case}.rope_caption"]
    axes, cpu = tiny_model.config.axes_dims, torch.device("cpu")
    torch.testing.assert_close(rope_of_prompt(caption.shape[1], axes, cpu), caption[0])
    torch.testing.assert_close(
        rope_of_image(h, w, (1.0, 1.0), (0.0, 0.0), caption.shape[1], axes, cpu),
        recorded[f"inter.{case}.rope_image"][0],
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", ["64x128.cap7.t0.3", "64x128.cap40.t0.97", "80x80.cap40.t0.3"])
def test_bf16_is_the_published_within_rounding(golden, tiny_weights, case):
    recorded = golden("dit_bf16")
    model = L2PTransformer(L2PConfig.from_shapes(recipe.shapes(recipe.TINY))).to(torch.bfloat16)
    model.load_state_dict(tiny_weights)
    image, captions = inputs(recorded, case)
    t = recorded[f"case.{case}.t"]
    assert t.dtype == torch.bfloat16
    with torch.no_grad():
        features, output = model.features(image, t, captions), model(image, t, captions)
    assert rms(features - recorded[f"case.{case}.feature_map"], features) < 0.025
    assert rms(output - recorded[f"case.{case}.output"], output) < 0.015


@pytest.mark.slow
def test_each_member_of_a_batch_gets_what_it_gets_alone(golden, tiny_model):
    recorded = golden("dit_fp32")
    captions = [
        recorded["input.caption.7"],
        recorded["input.caption.40"],
        recorded["input.caption.40"][:32],
    ]
    other = recorded["quirk.batch2.64x128.cap7+cap40.t0.3.image_b"]
    images = torch.cat([recorded["input.image.64x128"], other, -other])
    t = torch.tensor([0.3, 0.3, 0.9])
    with torch.no_grad():
        together = tiny_model(images, t, captions)
        alone = torch.cat(
            [tiny_model(images[i : i + 1], t[i : i + 1], captions[i : i + 1]) for i in range(3)]
        )
    torch.testing.assert_close(together, alone, atol=3e-5, rtol=0)
    torch.testing.assert_close(
        together[:1], recorded["case.64x128.cap7.t0.3.output"], atol=1e-4, rtol=0
    )


def test_prompts_of_unlike_length_attend_without_a_mask(tiny_model, monkeypatch):
    """Each to its own tokens: image tokens, and its prompt's padded to 32."""
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, attn_mask=None):
        assert attn_mask is None
        seen.append((len(k), k.shape[2]))
        return attend(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    prompts = [torch.randn(length, 64) for length in (7, 20, 40)]
    with torch.no_grad():
        tiny_model(torch.randn(3, 3, 64, 128), torch.full((3,), 0.5), prompts)
    config = tiny_model.config
    refiner, layers = [(2, 32), (1, 64)], [(2, 32 + 32), (1, 32 + 64)]
    noise = [(3, 32)]
    assert seen == (
        refiner * config.n_refiner_layers
        + noise * config.n_refiner_layers
        + layers * config.n_layers
    )


@pytest.mark.slow
@pytest.mark.parametrize("size, shared", [((64, 128), True), ((80, 80), False)])
def test_what_two_prompts_share_is_computed_once(tiny_model, size, shared):
    """80 x 80 pixels are 25 tokens, padded by 7, which stay where they are when a longer prompt
    moves the others."""
    image, t = torch.randn(2, 3, *size), torch.full((2,), 0.4)
    positive, negative = [torch.randn(70, 64)] * 2, [torch.randn(5, 64)] * 2
    runs, handles = {"noise_refiner": 0, "context_refiner": 0, "enc1": 0, "out_conv": 0}, []
    decoder = tiny_model.local_decoder
    for name, module in {
        "noise_refiner": tiny_model.noise_refiner[0],
        "context_refiner": tiny_model.context_refiner[0],
        "enc1": decoder.enc1,
        "out_conv": decoder.out_conv,
    }.items():

        def count(*_, name=name):
            runs[name] += 1

        handles.append(module.register_forward_hook(count))
    kept = Hooks(same_prompts=True), Hooks(same_prompts=True)
    with torch.no_grad():
        found = tiny_model(image, t, positive, kept[0], [(negative, kept[1])])
        again = tiny_model(image, t, positive, kept[0], [(negative, kept[1])])
        for handle in handles:
            handle.remove()
        alone = [tiny_model(image, t, prompts) for prompts in (positive, negative)]
    refined = 2 if shared else 4
    wanted = {"noise_refiner": refined, "context_refiner": 2, "enc1": 2, "out_conv": 4}
    assert runs == wanted
    for one, same, other in zip(found, again, alone):
        assert torch.equal(one, same)
        assert rms(one - other, other) < 3e-6  # rounding, through the layers after it


@pytest.mark.parametrize("patch", [16, 64, 128, 160])
def test_config_is_read_off_the_shapes(patch):
    config = L2PConfig(patch, 96, 3, 2, 1, 256, 64, decoder=PUBLISHED_DECODERS[patch])
    shapes = {
        name: tuple(tensor.shape) for name, tensor in L2PTransformer(config).state_dict().items()
    }
    assert L2PConfig.from_shapes(shapes) == config
    assert config.size_multiple == (320 if patch == 160 else patch)


def test_published_config_is_read_off_the_published_shapes():
    assert L2PConfig.from_shapes(recipe.shapes(recipe.FULL)) == L2PConfig()
    assert L2PConfig().axes_dims == (32, 48, 48)


@pytest.mark.parametrize("patch, height, width", [(64, 64, 192), (128, 128, 256), (160, 320, 640)])
def test_large_patches_draw_at_their_multiples(patch, height, width):
    config = L2PConfig(patch, 96, 3, 1, 1, 256, 64, decoder=PUBLISHED_DECODERS[patch])
    with torch.no_grad():
        out = L2PTransformer(config)(
            torch.randn(1, 3, height, width), torch.tensor([0.5]), [torch.randn(5, 64)]
        )
    assert out.shape == (1, 3, height, width) and out.isfinite().all()


@pytest.mark.parametrize(
    "image, t, captions, said",
    [
        ((1, 3, 60, 64), (1,), [(5, 64)], "multiples of 16"),
        ((1, 4, 64, 64), (1,), [(5, 64)], "expected \\(batch, 3, height, width\\)"),
        ((2, 3, 64, 64), (1,), [(5, 64)], "2 images came with t of shape \\(1,\\) and 1 prompts"),
        (
            (1, 3, 64, 64),
            (1,),
            [(5, 60)],
            "the embeddings of a prompt are \\(5, 60\\); expected \\(length, 64\\)",
        ),
        ((1, 3, 64, 64), (1,), [(0, 64)], "at least one row"),
    ],
)
def test_misfitting_inputs_are_rejected_by_name(tiny_model, image, t, captions, said):
    with pytest.raises(ValueError, match=said):
        tiny_model(torch.zeros(image), torch.zeros(t), [torch.zeros(shape) for shape in captions])


def test_tables_made_for_inference_serve_training(tiny_model):
    rope_of_prompt.cache_clear(), rope_of_image.cache_clear()
    arguments = torch.randn(1, 3, 64, 64), torch.tensor([0.5]), [torch.randn(5, 64)]
    with torch.inference_mode():
        tiny_model(*arguments)
    tiny_model(*arguments).square().mean().backward()
    assert all(parameter.grad is not None for parameter in tiny_model.layers.parameters())
    tiny_model.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["64x128.cap40.t0.3", "80x80.cap7.t0.97", "128x128.cap40.t0.3"])
def test_tokens_in_runs_give_the_published_output(golden, tiny_model, monkeypatch, case):
    monkeypatch.setattr(model, "TOKENS_AT_ONCE", 7)
    recorded = golden("dit_fp32")
    image, captions = inputs(recorded, case)
    t = recorded[f"case.{case}.t"]
    with torch.no_grad():
        torch.testing.assert_close(
            tiny_model(image, t, captions), recorded[f"case.{case}.output"], atol=1e-4, rtol=0
        )
        pair = [captions[0][:5], captions[0]], image.expand(2, -1, -1, -1), t.expand(2)
        in_runs = tiny_model(pair[1], pair[2], pair[0])
        monkeypatch.undo()
        torch.testing.assert_close(
            in_runs, tiny_model(pair[1], pair[2], pair[0]), atol=1e-5, rtol=0
        )


@pytest.mark.slow
def test_65536_tokens_hold_less_than_3_gib(monkeypatch):
    """The full widths in bfloat16, on tensors that have only a shape: a pass of the 1K model at
    4096 x 4096."""

    def peak():
        with torch.device("meta"):
            network = L2PTransformer(L2PConfig(n_layers=2)).bfloat16()
        with shapes_only(network), torch.no_grad():
            given = (
                torch.empty(1, 3, 4096, 4096, dtype=torch.bfloat16),
                torch.empty(1),
                [torch.empty(512, 2560, dtype=torch.bfloat16)],
            )
            with Meter() as meter:
                network(*given)
        return meter.peak()

    assert peak() < 3 * 2**30
    monkeypatch.setattr(model, "TOKENS_AT_ONCE", 10**6)
    assert peak() > 5 * 2**30
