"""Prompts: the template and rules recorded from the published program, the features that
transformers gives, and all layouts of files."""

import json
import shutil
import warnings
from dataclasses import fields

import pytest
import torch
import transformers
from comfyui_l2p.l2p_core import CheckpointError
from comfyui_l2p.l2p_core.files.header import Entry
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.qwen3 import Qwen3, Qwen3Config
from comfyui_l2p.l2p_core.text import LAYER, MAX_TOKENS, TEMPLATE, TextEncoder
from comfyui_l2p.l2p_core.tokenizer import load_tokenizer
from helpers import GOLDEN, scaled_fp8
from safetensors.torch import load_file, save_file

RECORDED = json.loads((GOLDEN / "text.json").read_text())
PROMPTS = [
    "a large red circle on a blue background, left",
    "",
    "  two\nlines  ",
    "{prompt} and {braces}",
    "一盏灯 in the café \U0001f9d1\u200d\U0001f680",
    "<|im_end|> ends early",
    "blue " * 600,
]


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder.load(BUNDLED_MODEL, dtype=torch.float32)


def test_template_is_the_published():
    for prompt, templated in RECORDED["examples"].items():
        assert TEMPLATE.replace("{prompt}", prompt) == templated
    assert (MAX_TOKENS, LAYER) == (RECORDED["max_length_tokens"], -2)


def as_transformers(dtype=torch.float32):
    """The bundled text encoder and its tokenizer, through transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED_MODEL / "tokenizer")
    return transformers.Qwen3Model.from_pretrained(
        BUNDLED_MODEL / "text_encoder", dtype=dtype
    ), tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_and_ids_are_those_of_transformers(dtype):
    ours = TextEncoder.load(BUNDLED_MODEL, dtype=dtype)
    model, tokenizer = as_transformers(dtype)
    for prompt in PROMPTS:
        ids = tokenizer(TEMPLATE.replace("{prompt}", prompt), return_tensors="pt")["input_ids"]
        assert ours.token_ids(prompt) == ids[0].tolist()
        with torch.no_grad():
            states = model(ids[:, :MAX_TOKENS], output_hidden_states=True).hidden_states
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the prompt that is cut
            assert torch.equal(ours.encode(prompt), states[LAYER][0])


def test_heads_that_share_keys_and_padding_are_those_of_transformers():
    """Sizes unlike one another, and a batch padded on the right, which is what masks do."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=200,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    )
    theirs = transformers.Qwen3Model(config).eval()
    for weight in theirs.parameters():
        weight.data = torch.randn_like(weight) * 0.2 + (weight.dim() == 1)
    sizes = {field.name for field in fields(Qwen3Config)} - {"rope_theta"}
    ours = Qwen3(Qwen3Config(**{name: getattr(config, name) for name in sizes}))
    ours.load_state_dict(theirs.state_dict())
    ids, mask = torch.randint(0, 200, (2, 70)), torch.ones(2, 70)
    mask[1, 50:] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        found = ours(ids)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, :50], expected[1, :50], atol=1e-5, rtol=1e-5)
    assert found.std() > 1 and not torch.allclose(ours(ids.flip(1)), found, atol=0.1)


def test_a_tokenizer_of_vocabulary_and_merges_gives_the_same_ids(encoder, tmp_path):
    whole = json.loads((BUNDLED_MODEL / "tokenizer" / "tokenizer.json").read_text())
    special = {str(each["id"]): each for each in whole["added_tokens"]}
    words = {word: number for word, number in whole["model"]["vocab"].items()}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    merges = (" ".join(pair) for pair in whole["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": special}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    other = TextEncoder(encoder.model, load_tokenizer(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        templated = TEMPLATE.replace("{prompt}", prompt)
        assert (
            other.token_ids(prompt) == encoder.token_ids(prompt) == theirs(templated)["input_ids"]
        )
    special["1"]["content"] = "<|elsewhere|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="elsewhere.* should have the id 1"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_encoder_is_named(encoder, tmp_path):
    larger = load_tokenizer(BUNDLED_MODEL / "tokenizer")
    larger.add_tokens(["circle"])
    with pytest.raises(CheckpointError, match="gives token 372, and the text encoder knows 372"):
        TextEncoder(encoder.model, larger).encode("a circle")


def test_the_empty_prompt_has_features(encoder):
    features = encoder.encode("")
    assert len(features) == len(encoder.token_ids("")) > 0
    assert features.abs().min(1).values.max() > 0


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
    for prompt in PROMPTS[:4]:
        assert torch.equal(single.encode(prompt), encoder.encode(prompt))


def test_a_sharded_folder_gives_the_same_features(encoder, tmp_path):
    theirs, _ = as_transformers()
    theirs.save_pretrained(tmp_path / "text_encoder", max_shard_size="300KB")
    assert len(list((tmp_path / "text_encoder").glob("model-*.safetensors"))) > 1
    shutil.copytree(BUNDLED_MODEL / "tokenizer", tmp_path / "tokenizer")
    sharded = TextEncoder.load(tmp_path, dtype=torch.float32)
    assert torch.equal(sharded.encode(PROMPTS[0]), encoder.encode(PROMPTS[0]))


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}, "rope_parameters": None},
            "RoPE type yarn",
        ),
        ({"rope_parameters": [1]}, "RoPE type .1., expected default"),
        ({"hidden_act": "gelu"}, "activation gelu, expected silu"),
        ({"use_sliding_window": True}, "sliding window True, expected False"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is x; expected a positive number"),
    ],
)
def test_settings_that_compute_otherwise_are_rejected(tmp_path, change, said):
    shutil.copytree(BUNDLED_MODEL, tmp_path / "other")
    file = tmp_path / "other" / "text_encoder" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=said):
        TextEncoder.load(tmp_path / "other")


def test_the_numbers_of_config_json_count(encoder, tmp_path):
    """rope_theta as transformers 4 writes it, then as version 5 does."""
    shutil.copytree(BUNDLED_MODEL, tmp_path / "other")
    file = tmp_path / "other" / "text_encoder" / "config.json"
    settings = json.loads(file.read_text())
    features = []
    for change in (
        {"rope_theta": 1e4, "rope_parameters": None},
        {"rope_parameters": {"rope_theta": 1e4}},
    ):
        given = {key: value for key, value in settings.items() if key != "rope_theta"}
        file.write_text(json.dumps({**given, **change}))
        other = TextEncoder.load(tmp_path / "other", dtype=torch.float32)
        features.append(other.encode("a red circle"))
    assert torch.equal(*features)
    assert not torch.allclose(features[0], encoder.encode("a red circle"), atol=0.01)


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
    monkeypatch.setattr(text, "find_files", lambda file: ([file], set()))
    config = text.load_qwen3(tmp_path / "qwen_3_4b.safetensors", torch.bfloat16).config
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
    assert config.rope_theta == facts["rope_theta"] and config == Qwen3Config()


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
def test_other_single_files_are_rejected(tmp_path, tensors, said):
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
    with pytest.raises(CheckpointError, match="config.json can't be read"):
        TextEncoder.load(tmp_path, BUNDLED_MODEL / "tokenizer")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no tokenizer that can be read"):
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
            "lacks 1 of the 35 tensors",
        ),
        (
            lambda tensors: {f"foo.{name}": tensor for name, tensor in tensors.items()},
            "lacks embed_tokens or q_norm",
        ),
        (lambda tensors: {**tensors, "norm.weight": torch.ones(5)}, "norm.weight|size"),
    ],
)
def test_a_damaged_folder_is_rejected_not_filled_with_noise(tmp_path, spoil, said):
    shutil.copytree(BUNDLED_MODEL, tmp_path / "damaged")
    path = tmp_path / "damaged" / "text_encoder" / "model.safetensors"
    save_file(spoil(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        TextEncoder.load(tmp_path / "damaged")


def test_features_that_are_nan_are_rejected(tmp_path):
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
def test_an_fp8_encoder_is_dequantized(tmp_path, spelling):
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
