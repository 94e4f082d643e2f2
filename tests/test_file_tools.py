"""Files out of files: merged, converted and exported ones hold the bytes wanted, in the naming
wanted, or say why not."""

import json
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from adapters import LORA_NAMINGS, a_lora, packed_change
from comfyui_l2p.l2p_core import CheckpointError, load_model, read_layout
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.config import PUBLISHED_DECODERS, L2PConfig
from comfyui_l2p.l2p_core.files.load import expected_shapes
from comfyui_l2p.l2p_core.model import L2PTransformer
from comfyui_l2p.quant.convert import convert, plan
from comfyui_l2p.quant.export import export
from comfyui_l2p.quant.merge import merge
from golden import recipe
from helpers import GOLDEN, comfyui_naming, int8
from safetensors import safe_open
from safetensors.torch import load_file

PREFIX = "model.diffusion_model."


def same(path, weights):
    """The file holds exactly these tensors, dtypes and bits."""
    found = load_file(path)
    assert found.keys() == weights.keys(), found.keys() ^ weights.keys()
    for key, tensor in weights.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key


def prefixed(weights, prefix=PREFIX):
    return {prefix + name: tensor for name, tensor in weights.items()}


def metadata_of(path):
    with safe_open(path, framework="pt") as opened:
        return opened.metadata()


def published_file(path, keys, dtype="BF16", prefix=""):
    """A sparse file of these names and shapes: the real size, no room taken."""
    header, offset = {}, 0
    for name, shape in keys.items():
        size = {"F32": 4, "BF16": 2}[dtype] * math.prod(shape)
        header[prefix + name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + offset)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_weights):
    """A trained part as trainings save it: BF16, no layers 1 and 2, other numbers."""
    return {
        name: (tensor * 2).bfloat16()
        for name, tensor in tiny_weights.items()
        if not name.startswith(("layers.1.", "layers.2."))
    }


# --- merge
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "pipe.dit."])
def test_merge_keeps_each_files_dtypes(tiny_weights, trained, write, out, prefix):
    base = write(tiny_weights, "base.safetensors", {"modelspec.resolution": "96x96"})
    part = write(prefixed(trained, prefix), "part.safetensors", {"modelspec.author": "A"})
    assert (
        main(["merge", "--file_a", str(part), "--file_b", str(base), "--file_out", str(out)]) == 0
    )
    same(out, {**tiny_weights, **trained})
    metadata = metadata_of(out)
    assert metadata["modelspec.resolution"] == "96x96" and metadata["modelspec.author"] == "A"
    assert [entry["name"] for entry in json.loads(metadata["l2p.inputs"])] == [
        "part.safetensors",
        "base.safetensors",
    ]
    load_model(out)


def test_merge_into_one_dtype_over_its_own_base(tiny_weights, trained, write):
    base = write(tiny_weights, "base.safetensors")
    merge(write(trained, "part.safetensors"), base, base, dtype="bf16")
    same(base, {name: tensor.bfloat16() for name, tensor in {**tiny_weights, **trained}.items()})


def test_merge_of_two_namings_follows_the_base(tiny_weights, trained, write, out):
    base = write(prefixed(comfyui_naming(tiny_weights)), "base.safetensors")
    merge(write(trained, "part.safetensors"), base, out)
    same(out, prefixed(comfyui_naming({**tiny_weights, **trained})))


REJECTED_PARTS = {
    "unknown": (
        lambda w: {"layers.0.extra.weight": torch.ones(1)},
        r"has 1 of .* tensors that base.safetensors lacks \(first: layers.0.extra.weight\).*--skip",
    ),
    "foreign": (lambda w: {"optimizer.step": torch.ones(1)}, r"lacks \(first: optimizer.step\)"),
    "misshapen": (
        lambda w: {"x_pad_token": torch.ones(1, 97)},
        r"x_pad_token is \(1, 97\), there \(1, 96\).*--skip 'x_pad_token'",
    ),
}


@pytest.mark.parametrize("case", REJECTED_PARTS)
def test_merge_rejects_what_does_not_fit_unless_skipped_by_name(
    tiny_weights, trained, write, out, case
):
    make, said = REJECTED_PARTS[case]
    base, wrong = write(tiny_weights, "base.safetensors"), make(tiny_weights)
    part = write({**trained, **wrong}, "part.safetensors")
    with pytest.raises(CheckpointError, match=said):
        merge(part, base, out)
    assert not out.exists()
    merge(part, base, out, skip=list(wrong))
    same(
        out,
        {**tiny_weights, **{name: tensor for name, tensor in trained.items() if name not in wrong}},
    )


def test_merge_names_other_mistakes(tiny_weights, trained, write, out):
    base, part = write(tiny_weights, "base.safetensors"), write(trained, "part.safetensors")
    with pytest.raises(
        CheckpointError, match="part.safetensors is the trained part.*the other way round"
    ):
        merge(base, part, out)
    with pytest.raises(CheckpointError, match="--skip nothing.* matches none of"):
        merge(part, base, out, skip=["nothing.*"])
    with pytest.raises(CheckpointError, match="holds no tensors to merge"):
        merge(part, base, out, skip=["*"])


@pytest.mark.slow
@pytest.mark.parametrize("naming", LORA_NAMINGS)
@pytest.mark.parametrize("base_naming", [dict, comfyui_naming])
def test_a_lora_is_added_to_the_weights_it_names(tiny_weights, write, out, naming, base_naming):
    base = write(prefixed(base_naming(tiny_weights)), "base.safetensors")
    lora, added = a_lora(tiny_weights, naming, alpha=2)
    assert (
        main(
            [
                "merge",
                "--trained",
                str(write(lora, "lora.safetensors")),
                "--base",
                str(base),
                "-o",
                str(out),
                "--strength",
                "0.5",
            ]
        )
        == 0
    )
    expected = prefixed(
        base_naming(
            {name: tensor + 0.5 * added.get(name, 0) for name, tensor in tiny_weights.items()}
        )
    )
    found = load_file(out)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)
    merge(write(lora, "lora.safetensors"), base, out, dtype="bf16", strength=0.0)
    same(
        out,
        {name: tensor.bfloat16() for name, tensor in prefixed(base_naming(tiny_weights)).items()},
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (
            lambda lora: {**lora, "layers.0.attention.to_q.dora_scale": torch.ones(95, 1)},
            r"'dora_scale': \(95, 1\).*makes no \(96, 96\)",
        ),
        (
            lambda lora: {**lora, "layers.0.attention.to_q.oft_blocks": torch.ones(96)},
            "to_q.oft_blocks belongs to nothing",
        ),
        (
            lambda lora: {**lora, "lora_te_text_model.lora_down.weight": torch.ones(4, 4)},
            "lora_te_text_model.* belongs to nothing",
        ),
        (
            lambda lora: {
                name: tensor for name, tensor in lora.items() if "to_q.lora_B" not in name
            },
            "has down for layers.0.attention.to_q.weight, but no up",
        ),
        (
            lambda lora: {
                name: tensor[:, :9] if "to_q.lora_A" in name else tensor
                for name, tensor in lora.items()
            },
            r"'down': \(4, 9\).*makes no \(96, 96\)",
        ),
        (
            lambda lora: {name: tensor * torch.inf for name, tensor in lora.items()},
            "with the LoRA holds NaN or infinite",
        ),
    ],
)
def test_a_lora_that_does_not_fit_is_rejected(tiny_weights, write, out, change, said):
    lora = write(change(a_lora(tiny_weights)[0]), "lora.safetensors")
    with pytest.raises(CheckpointError, match=said):
        merge(lora, write(tiny_weights, "base.safetensors"), out)
    assert not out.exists()


def merged_rows(lora, base, write, out, metadata=None):
    """What merging added to q, k and v of the first layer, in fp32."""
    file = write(lora, "lora.safetensors", metadata)
    merge(file, write(base, "base.safetensors"), out, dtype="fp32")
    found = load_file(out)
    names = [f"layers.0.attention.to_{part}.weight" for part in "qkv"]
    return torch.cat([found[name] - base[name] for name in names])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora_A", "lora_down", "loha", "lokr", "lokr of four", "diff"])
@pytest.mark.parametrize(
    "name", ["diffusion_model.layers.0.attention.qkv", "lora_unet_layers_0_attention_qkv"]
)
def test_packed_layers_are_merged_as_comfyui_loads_them(tiny_weights, write, out, kind, name):
    held, change = packed_change(kind, 3 * 96, 96)
    lora = {f"{name}.{part}": tensor for part, tensor in held.items()}
    found = merged_rows(lora, tiny_weights, write, out)
    torch.testing.assert_close(found, change, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("place", ["diffusers metadata", "peft file", "peft file, rslora"])
def test_a_recorded_alpha_counts(tiny_weights, write, out, place):
    """Alpha 16 at rank 4: a factor of 4, with rslora of 8."""
    a, b = torch.randn(4, 96) / 9, torch.randn(96, 4) / 9
    layer, metadata = "transformer.layers.0.attention.to_k", None
    config = {"r": 4, "lora_alpha": 16, "use_rslora": "rslora" in place}
    if place == "diffusers metadata":
        config = {f"transformer.{name}": value for name, value in config.items()}
        metadata = {"lora_adapter_metadata": json.dumps(config)}
    else:
        (out.parent / "adapter_config.json").write_text(json.dumps(config))
    lora = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    found = merged_rows(lora, tiny_weights, write, out, metadata)[96:192]
    torch.testing.assert_close(found, (8 if "rslora" in place else 4) * b @ a, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "key",
    [
        "layers.0.attention.to_q.oft_blocks",
        "layers.0.attention.to_q.lora.down.weight",
        "diffusion_model.layers.0.attention.qkv.diff",
        "layers.0.attention.to_q.dora_scale",
    ],
)
def test_other_adapters_are_called_what_they_are(write, key):
    assert read_layout(write({key: torch.zeros(4, 4)})).kind == "lora"


def test_a_lora_does_not_go_into_8_bits(tiny_weights, trained, write, out):
    lora, base = (
        write(a_lora(tiny_weights)[0], "lora.safetensors"),
        write(int8(tiny_weights)[0], "base.safetensors"),
    )
    with pytest.raises(CheckpointError, match="is I8. Merge the LoRA into the BF16"):
        merge(lora, base, out)
    with pytest.raises(ValueError, match="--skip is for whole tensors"):
        merge(lora, write(tiny_weights, "base.safetensors"), out, skip=["*"])
    with pytest.raises(ValueError, match="--strength is of a LoRA"):
        merge(
            write(trained, "part.safetensors"),
            write(tiny_weights, "base.safetensors"),
            out,
            strength=0.5,
        )


# --- convert
# --------------------------------------------------------------------------------------------------


def latent_of(weights):
    """A tiny latent Z-Image: the backbone with an embedding and a final layer of patch 2, 16
    channels."""
    backbone = {
        name: tensor.bfloat16()
        for name, tensor in weights.items()
        if not name.startswith(("local_decoder.", "all_x_"))
    }
    return {
        "all_x_embedder.2-1.weight": torch.zeros(96, 64),
        "all_x_embedder.2-1.bias": torch.zeros(96),
        **backbone,
        "all_final_layer.2-1.linear.weight": torch.zeros(64, 96),
        "all_final_layer.2-1.linear.bias": torch.zeros(64),
        "all_final_layer.2-1.adaLN_modulation.1.weight": torch.zeros(96, 96),
        "all_final_layer.2-1.adaLN_modulation.1.bias": torch.zeros(96),
    }


def drawn_longhand(name, shape, fan_in, seed):
    raw = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw(
        math.prod(shape)
    )
    return torch.tensor(
        (raw // 2**40 / 2**23 - 1).astype(np.float32) * np.float32(1 / math.sqrt(fan_in))
    ).reshape(shape)


def test_convert_plan_is_the_recorded_one(tmp_path):
    recorded = json.loads((GOLDEN / "convert.json").read_text())
    keys = json.loads((GOLDEN / "zimage_turbo_keys.json").read_text())["keys"]
    latent = published_file(tmp_path / "latent.safetensors", keys)
    layout = read_layout(latent)
    found = {
        piece.name: ["new" if callable(piece.origin) else "copied", list(piece.shape)]
        for piece in plan(layout, 16, 0)
    }
    assert found == recorded["targets"]
    assert {piece.dtype for piece in plan(layout, 16, 0) if callable(piece.origin)} == {"F32"}
    assert {piece.dtype for piece in plan(layout, 16, 0) if not callable(piece.origin)} == {"BF16"}


@pytest.mark.parametrize("patch", [64, 128, 160])
def test_convert_plan_of_high_resolutions_has_the_published_keys(tmp_path, patch):
    keys = json.loads((GOLDEN / "zimage_turbo_keys.json").read_text())["keys"]
    layout = read_layout(published_file(tmp_path / "latent.safetensors", keys))
    shapes = {
        piece.name: list(piece.shape) for piece in plan(layout, patch, 0) if callable(piece.origin)
    }
    published = json.loads((GOLDEN / "l2p_hr_keys.json").read_text())[str(patch)]
    decoder = {
        name: shape for name, shape in published.items() if name.startswith("local_decoder.")
    }
    assert {
        name: shape for name, shape in shapes.items() if name.startswith("local_decoder.")
    } == decoder
    assert shapes[f"all_x_embedder.{patch}-1.weight"] == [3840, 3 * patch**2]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["published", "shards", "comfyui"])
def test_convert_copies_the_backbone_and_draws_the_rest(tiny_weights, write, out, form):
    latent = latent_of(tiny_weights)
    if form == "shards":
        paths = [
            write(dict(list(latent.items())[i::3]), f"in/model-{i + 1:05d}-of-00003.safetensors")
            for i in range(3)
        ]
        assert (
            main(["convert", "--latent_ckpt_files", *map(str, paths), "--output_path", str(out)])
            == 0
        )
        first = out.read_bytes()
        convert(paths[0].parent, out)
        assert (
            load_file(out).keys()
            == expected_shapes(L2PConfig.from_shapes(recipe.shapes(recipe.TINY))).keys()
        )
        assert (
            first[8 + struct.unpack("<Q", first[:8])[0] :]
            == (again := out.read_bytes())[8 + struct.unpack("<Q", again[:8])[0] :]
        )
    elif form == "comfyui":
        names = comfyui_naming(latent)
        names = {
            key.replace("all_final_layer.2-1.", "final_layer."): tensor
            for key, tensor in names.items()
        }
        convert(
            write(prefixed({**names, "norm_final.weight": torch.ones(96)}), "latent.safetensors"),
            out,
        )
    else:
        convert(write(latent, "latent.safetensors"), out)
    expected = {name: tensor.bfloat16() for name, tensor in tiny_weights.items()}
    shapes = recipe.shapes(recipe.TINY)
    for name, shape in shapes.items():
        if name.startswith(("local_decoder.", "all_x_")):
            expected[name] = drawn_longhand(
                name, shape, math.prod(shapes[name.replace(".bias", ".weight")][1:]), 0
            )
    same(out, expected)
    assert metadata_of(out)["modelspec.resolution"] == "1024x1024"
    load_model(out)


def test_new_tensors_are_spread_as_torch_spreads_them(tiny_weights, write, out):
    torch.manual_seed(0)
    model = L2PTransformer(L2PConfig.from_shapes(recipe.shapes(recipe.TINY)))
    convert(write(latent_of(tiny_weights)), out, seed=7)
    found = load_file(out)
    for name, theirs in model.state_dict().items():
        if name.startswith(("local_decoder.", "all_x_")) and theirs.numel() > 5000:
            assert found[name].std() == pytest.approx(float(theirs.std()), rel=0.05)
            assert found[name].abs().max() == pytest.approx(float(theirs.abs().max()), rel=0.01)
            assert (
                abs(float(found[name].mean()))
                < 0.02 * float(theirs.std()) + 4 * float(theirs.std()) / theirs.numel() ** 0.5
            )
    assert not torch.equal(
        found["all_x_embedder.16-1.weight"],
        drawn_longhand("all_x_embedder.16-1.weight", (96, 768), 768, 0),
    )


@pytest.mark.parametrize("old, new", [(64, 128), (64, 160), (128, 160)])
def test_convert_to_a_higher_resolution_copies_what_fits(tiny_weights, write, out, old, new):
    tiny = {
        name: tensor
        for name, tensor in tiny_weights.items()
        if not name.startswith(("local_decoder.", "all_x_"))
    }
    config = L2PConfig.from_shapes(recipe.shapes(recipe.TINY))
    shapes = {
        patch: expected_shapes(
            L2PConfig(**{**vars(config), "patch_size": patch, "decoder": PUBLISHED_DECODERS[patch]})
        )
        for patch in (old, new)
    }
    model = {name: tiny.get(name, torch.full(shape, 0.5)) for name, shape in shapes[old].items()}
    convert(write(model, metadata={"modelspec.resolution": "4096x4096"}), out, patch=new)
    found = load_file(out)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes[new]
    for name, tensor in found.items():
        assert (
            torch.equal(tensor, model[name]) == (shapes[old].get(name) == shapes[new][name])
            if name in model
            else True
        )
    assert metadata_of(out)["modelspec.resolution"] == f"{64 * new}x{64 * new}"


def test_convert_names_what_it_cannot_use(tiny_weights, write, out):
    latent = latent_of(tiny_weights)
    few = {
        name: tensor
        for name, tensor in latent.items()
        if not name.startswith("layers.3.feed_forward.w1.")
    }
    for make, said in [
        (
            write(few),
            "lacks 1 tensors that both models have .first: layers.3.feed_forward.w1.weight",
        ),
        (
            write(latent | {"layers.0.extra": torch.ones(1)}, "b.safetensors"),
            "1 tensors that no Z-Image or L2P model has",
        ),
        (write(tiny_weights, "c.safetensors"), "has patch 16 already"),
        (write(int8(latent)[0], "d.safetensors"), "is quantized .*Give the BF16"),
        (write({"a": torch.ones(1)}, "e.safetensors"), "is not an L2P model"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            convert(make, out)
    with pytest.raises(CheckpointError, match="--patch is 32; expected one of 16, 64, 128, 160"):
        convert(write(latent), out, patch=32)
    assert not out.exists()


# --- export
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_export_and_back_is_exact(tiny_weights, write, out, tmp_path, prefix):
    source = write(
        {
            name: tensor if name.startswith("layers.2.") else tensor.bfloat16()
            for name, tensor in tiny_weights.items()
        },
        metadata={"modelspec.resolution": "96x96"},
    )
    export(source, out, "comfyui", prefix)
    same(out, prefixed(comfyui_naming(load_file(source)), prefix))
    export(out, tmp_path / "back.safetensors", "published")
    same(tmp_path / "back.safetensors", load_file(source))
    assert metadata_of(tmp_path / "back.safetensors")["modelspec.resolution"] == "96x96"


@pytest.mark.slow
@pytest.mark.parametrize("convrot", [0, 16])
@pytest.mark.parametrize("granularity", ["tensor", "flat", "row"])
def test_int8_is_exported_and_back_exactly(
    tiny_weights, write, out, tmp_path, granularity, convrot
):
    tensors, _ = int8(comfyui_naming(tiny_weights), PREFIX, granularity, "tensors", convrot)
    source = write(tensors)
    assert main(["export", str(source), "-o", str(out), "--naming", "published"]) == 0
    assert load_file(out)["layers.0.attention.to_k.weight"].dtype == torch.int8
    export(out, tmp_path / "back.safetensors", "comfyui")
    same(tmp_path / "back.safetensors", tensors)


def test_int8_parts_with_their_own_scales_are_packed_row_by_row(tiny_weights, write, out):
    tensors, _ = int8(tiny_weights, granularity="tensor")
    export(write(tensors), out)
    found, key = load_file(out), "layers.0.attention.to_{}.weight"
    scales = torch.cat([tensors[key.format(part) + "_scale"].expand(96, 1) for part in "qkv"])
    assert torch.equal(found[f"{PREFIX}layers.0.attention.qkv.weight_scale"], scales)
    assert torch.equal(
        found[f"{PREFIX}layers.0.attention.qkv.weight"],
        torch.cat([tensors[key.format(part)] for part in "qkv"]),
    )


def test_export_dequantizes_int8(tiny_weights, write, out):
    tensors, _ = int8(comfyui_naming(tiny_weights), PREFIX, "row", "tensors")
    export(write(tensors), out, "published", dtype="fp32")
    weight = load_file(out)["layers.1.attention.to_v.weight"]
    key = f"{PREFIX}layers.1.attention.qkv.weight"
    assert torch.equal(weight, (tensors[key].float() * tensors[f"{key}_scale"])[192:])
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float32}


def test_export_names_what_it_cannot_pack(tiny_weights, trained, write, out):
    export(write(trained), out)  # a trained part goes too
    same(out, prefixed(comfyui_naming(trained)))
    partial = {
        name: tensor for name, tensor in trained.items() if "layers.0.attention.to_q" not in name
    }
    with pytest.raises(CheckpointError, match="packs q, k and v, of which only 2 of 3 are there"):
        export(write(partial), out)
    one = int8(
        {name: tensor for name, tensor in tiny_weights.items() if "layers.0.attention.to_q" in name}
    )[0]
    with pytest.raises(CheckpointError, match="quantized in different ways.*--dtype bf16"):
        export(write({**tiny_weights, **one}), out)


def test_export_leaves_other_models_out_and_says_so(tiny_weights, write, out):
    with pytest.warns(
        UserWarning,
        match="holds 1 tensors of other models .first: text_encoders.a.; they are not written",
    ):
        export(
            write({**prefixed(tiny_weights), "text_encoders.a": torch.ones(1)}), out, "published"
        )
    same(out, tiny_weights)
