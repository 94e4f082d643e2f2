"""Prompts: the template and rules recorded from the published program; files in both layouts give
the same features."""

import json
import shutil

import pytest
import torch
from comfyui_l2p.l2p_core import CheckpointError
from comfyui_l2p.l2p_core.files.header import Entry
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.text import LAYER, MAX_TOKENS, TEMPLATE, TextEncoder
from helpers import GOLDEN, scaled_fp8
from safetensors.torch import load_file, save_file

RECORDED = json.loads((GOLDEN / "text.json").read_text())
PROMPTS = [
    "a large red circle on a blue background, left",
    "",
    "  two\nlines  ",
    "{prompt} and {braces}",
]


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.load(BUNDLED_MODEL, dtype=torch.float32)


def test_template_is_the_published():
    for prompt, templated in RECORDED["examples"].items():
        assert TEMPLATE.replace("{prompt}", prompt) == templated
    assert (MAX_TOKENS, LAYER) == (RECORDED["max_length_tokens"], -2)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_features_are_what_the_last_layer_takes_in(encoder, prompt):
    tokens = encoder.tokenizer(TEMPLATE.replace("{prompt}", prompt), return_tensors="pt")[
        "input_ids"
    ]
    seen = []
    hook = encoder.model.layers[-1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    features = encoder.encode(prompt)
    hook.remove()
    assert features.shape == (tokens.shape[1], 96)
    assert torch.equal(features, seen[0][0])


def test_padding_as_published_changes_nothing(encoder):
    """The published program pads to 512 and drops the padding again; we never pad."""
    ids = encoder.tokenizer(
        TEMPLATE.replace("{prompt}", PROMPTS[0]),
        return_tensors="pt",
        padding="max_length",
        max_length=MAX_TOKENS,
        truncation=True,
    )
    with torch.no_grad():
        padded = encoder.model(
            input_ids=ids["input_ids"],
            attention_mask=ids["attention_mask"].bool(),
            output_hidden_states=True,
        ).hidden_states[-2]
    torch.testing.assert_close(
        encoder.encode(PROMPTS[0]), padded[0][ids["attention_mask"][0].bool()], atol=1e-5, rtol=0
    )


def test_the_empty_prompt_has_features(encoder):
    features = encoder.encode("")
    assert (
        len(features) == len(encoder.tokenizer.tokenize(RECORDED["examples"][""]))
        and features.abs().min(1).values.max() > 0
    )


def test_a_long_prompt_is_cut_with_a_warning(encoder):
    with pytest.warns(
        UserWarning, match="512 are read: the last .* are left out .it begins 'blue blue"
    ):
        features = encoder.encode("blue " * 600)
    assert features.shape == (512, 96)


def test_a_single_file_gives_the_same_features(encoder, tmp_path):
    tensors = load_file(BUNDLED_MODEL / "text_encoder" / "model.safetensors")
    save_file(
        {f"model.{name}": tensor for name, tensor in tensors.items()},
        tmp_path / "qwen_3_4b.safetensors",
    )
    single = TextEncoder.load(
        tmp_path / "qwen_3_4b.safetensors", BUNDLED_MODEL / "tokenizer", dtype=torch.float32
    )
    for prompt in PROMPTS:
        assert torch.equal(single.encode(prompt), encoder.encode(prompt))


def test_a_sharded_folder_gives_the_same_features(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path / "text_encoder", max_shard_size="300KB")
    assert len(list((tmp_path / "text_encoder").glob("model-*.safetensors"))) > 1
    shutil.copytree(BUNDLED_MODEL / "tokenizer", tmp_path / "tokenizer")
    sharded = TextEncoder.load(tmp_path, dtype=torch.float32)
    assert torch.equal(sharded.encode(PROMPTS[0]), encoder.encode(PROMPTS[0]))


def test_the_published_encoder_is_read_off_its_shapes(tmp_path, monkeypatch):
    """The configuration made for ComfyUI's single file, for the full Qwen3-4B: the header alone, no
    weights."""
    from comfyui_l2p.l2p_core import text

    facts = RECORDED["text_encoder"]
    wide = facts["attention_heads"] * facts["head_dim"]
    shapes = {
        "model.embed_tokens.weight": (facts["vocab_size"], 2560),
        "model.norm.weight": (2560,),
    }
    for layer in range(facts["layers"]):
        for name, shape in {
            "self_attn.q_proj": (wide, 2560),
            "self_attn.k_proj": (1024, 2560),
            "self_attn.v_proj": (1024, 2560),
            "self_attn.o_proj": (2560, wide),
            "self_attn.q_norm": (128,),
            "self_attn.k_norm": (128,),
            "mlp.gate_proj": (9728, 2560),
            "mlp.up_proj": (9728, 2560),
            "mlp.down_proj": (2560, 9728),
            "input_layernorm": (2560,),
            "post_attention_layernorm": (2560,),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    assert len(shapes) == facts["tensors"]
    entries = {key: Entry(tmp_path, key, "BF16", shape, 0, 0) for key, shape in shapes.items()}
    monkeypatch.setattr(text, "read_header", lambda file: (entries, {}))
    monkeypatch.setattr(
        text,
        "load_file",
        lambda file: {
            key: torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for key, shape in shapes.items()
        },
    )
    config = text.load_single_file(tmp_path / "qwen_3_4b.safetensors", torch.bfloat16).config
    assert (
        config.num_hidden_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.vocab_size,
        config.rms_norm_eps,
    ) == tuple(
        facts[key]
        for key in (
            "layers",
            "hidden_size",
            "intermediate_size",
            "attention_heads",
            "key_value_heads",
            "head_dim",
            "vocab_size",
            "rms_norm_eps",
        )
    )
    rope = getattr(config, "rope_parameters", None) or vars(config)  # transformers 5 or 4
    assert rope["rope_theta"] == facts["rope_theta"]


@pytest.mark.parametrize(
    "tensors, said",
    [
        ({"a": torch.ones(2)}, "is no Qwen3 text encoder: it lacks embed_tokens"),
        (
            {
                "model.embed_tokens.weight": torch.ones(4, 2),
                "model.layers.0.self_attn.q_norm.weight": torch.ones(2),
                "model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2).to(torch.int8),
            },
            "is quantized",
        ),
        (
            {
                name: tensor
                for name, tensor in load_file(
                    BUNDLED_MODEL / "text_encoder" / "model.safetensors"
                ).items()
                if "layers.1.mlp.up_proj" not in name
            },
            "is not a whole Qwen3 text encoder.*layers.1.mlp.up_proj",
        ),
    ],
)
def test_other_single_files_are_refused(tmp_path, tensors, said):
    save_file(tensors, tmp_path / "encoder.safetensors")
    with pytest.raises(CheckpointError, match=said):
        TextEncoder.load(tmp_path / "encoder.safetensors", BUNDLED_MODEL / "tokenizer")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer in .*Give the tokenizer/ folder of"):
        TextEncoder.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        TextEncoder.load(tmp_path / "nowhere", BUNDLED_MODEL / "tokenizer")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds a model of type None, expected qwen3"):
        TextEncoder.load(tmp_path, BUNDLED_MODEL / "tokenizer")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="holds no Qwen3 text encoder"):
        TextEncoder.load(tmp_path, BUNDLED_MODEL / "tokenizer")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no tokenizer that transformers can read"):
        TextEncoder.load(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (
            lambda tensors: {
                name: tensor
                for name, tensor in tensors.items()
                if "layers.1.mlp.up_proj" not in name
            },
            "lacks 1 of the text encoder's tensors",
        ),
        (
            lambda tensors: {f"foo.{name}": tensor for name, tensor in tensors.items()},
            "lacks 3. of the text encoder's tensors",
        ),
        (lambda tensors: {**tensors, "norm.weight": torch.ones(5)}, "norm.weight|size"),
    ],
)
def test_a_damaged_folder_is_refused_not_filled_with_noise(tmp_path, spoil, said):
    shutil.copytree(BUNDLED_MODEL, tmp_path / "damaged")
    path = tmp_path / "damaged" / "text_encoder" / "model.safetensors"
    save_file(spoil(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        TextEncoder.load(tmp_path / "damaged")


def test_features_that_are_nan_are_refused(tmp_path):
    shutil.copytree(BUNDLED_MODEL, tmp_path / "damaged")
    path = tmp_path / "damaged" / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    save_file(
        {**tensors, "embed_tokens.weight": tensors["embed_tokens.weight"] * torch.nan},
        path,
        metadata={"format": "pt"},
    )
    with pytest.raises(CheckpointError, match="gives NaN"):
        TextEncoder.load(tmp_path / "damaged").encode("a")


@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight"])
def test_an_fp8_encoder_is_multiplied_out(tmp_path, spelling):
    weights = load_file(BUNDLED_MODEL / "text_encoder" / "model.safetensors")
    weights = {f"model.{key}": tensor for key, tensor in weights.items()}
    scaled, plain = scaled_fp8(
        weights, lambda key, tensor: tensor.dim() == 2 and "embed" not in key, spelling
    )
    features = []
    for name, tensors in (("scaled", scaled), ("plain", plain)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
        encoder = TextEncoder.load(
            tmp_path / f"{name}.safetensors", BUNDLED_MODEL / "tokenizer", dtype=torch.bfloat16
        )
        features.append(encoder.encode("a red circle"))
    assert torch.equal(*features)
