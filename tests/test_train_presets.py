"""Settings that `l2p train --memory` chooses, further optimizers, and kinds of LoRA: each against
training without it, or against its formula."""

import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline, load_model
from comfyui_l2p.l2p_core.flow import loss_weights, training_sigmas
from comfyui_l2p.l2p_core.train import run as training
from comfyui_l2p.l2p_core.train.config import read_config
from comfyui_l2p.l2p_core.train.low_memory import FrozenLinear
from comfyui_l2p.l2p_core.train.prepare import make_optimizer, prepare
from comfyui_l2p.l2p_core.train.presets import CARDS, PRESETS, preset
from safetensors.torch import load_file
from small_runs import CHECKPOINT, config, losses
from torch import nn


def chosen(memory, **given):
    return preset(memory, given)


def trained_by(data, name, **changes):
    settings = config(data, output=str(data.parent / name), steps=1, batch=1, **changes)
    return load_file(training.train(settings, progress=False))


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"lora_rank": 4}])
def test_the_smallest_cards_preset_trains_as_the_next_to_the_bit(data, given):
    """Swapping and offloading move things, and nothing else."""
    common = {"mixed_precision": "bf16", **given}
    whole, swapped = (
        trained_by(data, card, **common, **chosen(card, **given)) for card in ("12gb", "8gb")
    )
    assert chosen("12gb", **given) != chosen("8gb", **given)
    assert all(torch.equal(swapped[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_a_preset_trains_as_its_optimizer_alone_within_rounding(data):
    common = {"learning_rate": 1e-3, "optimizer": "adafactor"}
    plain = trained_by(data, "plain", **common)
    small = trained_by(data, "small", mixed_precision="bf16", **{**common, **chosen("16gb")})
    before = load_file(CHECKPOINT)
    ways = [
        torch.cat([(after[name].double() - before[name].double()).flatten() for name in plain])
        for after in (plain, small)
    ]
    # Steps are about as long as what bfloat16 tells apart, and rounded to it at random.
    assert torch.nn.functional.cosine_similarity(*ways, dim=0) > 0.6
    wanted, found = (
        [loss for _, loss in losses(data.parent / name)] for name in ("plain", "small")
    )
    assert found == pytest.approx(wanted, rel=0.02)


def test_presets_give_way_to_settings_and_explain_themselves(data):
    base = {"checkpoint": "c", "data": "d", "output": "o"}
    for card in CARDS:
        assert read_config(None, {**base, "memory": card}).freeze == "5:-5"
    mine = read_config(None, {**base, "memory": "16gb", "quantize_frozen": "nf4"})
    assert mine.quantize_frozen == "nf4" and mine.optimizer == "adafactor"
    assert read_config(None, {**base, "memory": "24gb", "freeze": ""}).quantize_frozen == ""
    with pytest.raises(ValueError, match="freeze '' .* there are 80gb, 24gb"):
        read_config(None, {**base, "memory": "8gb", "freeze": ""})
    with pytest.raises(ValueError, match="accumulate 4 .*memory 16gb chose .*step_in_backward"):
        read_config(None, {**base, "memory": "16gb", "accumulate": 4})
    with pytest.raises(ValueError, match="expected one of 80gb"):
        read_config(None, {**base, "memory": "4gb"})
    toml = data.parent / "memory.toml"
    toml.write_text('checkpoint = "c"\ndata = "d"\noutput = "o"\nmemory = "16gb"\n')
    assert read_config(toml, {}) == read_config(None, {**base, "memory": "16gb"})
    assert read_config(toml, {"memory": "80gb"}) == read_config(None, base)
    assert set(PRESETS) == {"layers", "everything", "LoRA"}


@pytest.mark.parametrize("kind", ["", "int8", "nf4"])
def test_a_swapped_linear_computes_the_same_and_stays_where_it_is(kind):
    torch.manual_seed(0)
    linear = nn.Linear(256, 192, bias=False)
    linear.requires_grad_(False)
    whole, swapped = (FrozenLinear(linear, kind, swapped) for swapped in (False, True))
    inputs = [torch.randn(2, 256).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [module(x) for module, x in zip((whole, swapped), inputs)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    for module in (whole, swapped):
        module.to("meta")
    assert whole.weight.is_meta and not swapped.weight.is_meta
    assert list(dict(swapped.named_parameters())) == ["weight"]


def test_adafactor_is_its_paper_and_keeps_next_to_nothing(data):
    """Two steps longhand, after arXiv 1804.04235, algorithm 4, without relative steps."""
    torch.manual_seed(0)
    weight = torch.randn(40, 60)
    parameter = nn.Parameter(weight.clone())
    settings = config(data, optimizer="adafactor", learning_rate=0.01, weight_decay=0.1)
    optimizer = make_optimizer({"weight": parameter}, settings)
    rows, columns, wanted = torch.zeros(40, 1), torch.zeros(1, 60), weight.double()
    for step in (1, 2):
        gradient = torch.randn(40, 60)
        parameter.grad = gradient.clone()
        optimizer.step()
        decay = 1 - step**-0.8
        square = gradient.double() ** 2 + 1e-30
        rows = decay * rows + (1 - decay) * square.mean(1, keepdim=True)
        columns = decay * columns + (1 - decay) * square.mean(0, keepdim=True)
        update = gradient / (rows @ columns / rows.mean()).sqrt()
        update /= max(1.0, update.square().mean().sqrt().item())
        wanted = wanted * (1 - 0.01 * 0.1) - 0.01 * update
    torch.testing.assert_close(parameter.detach().double(), wanted, atol=1e-6, rtol=1e-5)
    state = optimizer.state_dict()["each"][0]["state"][0]
    numbers = sum(value.numel() for value in state.values() if isinstance(value, torch.Tensor))
    assert numbers <= 40 + 60 + 1


def test_muon_steps_evenly_in_all_directions_and_leaves_the_rest_to_adamw(data):
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(32, 64))
    other = nn.Parameter(torch.zeros(64))
    settings = config(data, optimizer="muon", learning_rate=0.01, weight_decay=0.0)
    optimizer = make_optimizer({"layers.0.w": matrix, "x_pad_token": other}, settings)
    matrix.grad, other.grad = torch.randn(32, 64), torch.randn(64)
    optimizer.step()
    # Singular values near 1 by Newton and Schulz, times 0.2 sqrt(64): arXiv 2502.16982, (4).
    singular = torch.linalg.svdvals(matrix.detach()) / (0.01 * 0.2 * 8)
    assert 0.6 < singular.min() and singular.max() < 1.3
    torch.testing.assert_close(other.detach(), -0.01 * other.grad.sign(), atol=1e-5, rtol=1e-3)
    again = make_optimizer({"layers.0.w": matrix, "x_pad_token": other}, settings)
    again.load_state_dict(optimizer.state_dict())
    assert len(again.state_dict()["each"]) == 2


def test_prodigy_finds_a_rate_and_asks_for_a_multiple_of_it(data):
    pytest.importorskip("prodigyopt")
    with pytest.raises(ValueError, match="give 1"):
        config(data, optimizer="prodigy", learning_rate=5e-5)
    target = torch.full((50,), 3.0)
    weights = nn.Parameter(torch.zeros(50))
    settings = config(data, optimizer="prodigy", learning_rate=1.0, weight_decay=0.0)
    optimizer = make_optimizer({"weights": weights}, settings)
    for _ in range(200):
        weights.grad = 2 * (weights.detach() - target)
        optimizer.step()
    assert (weights.detach() - target).abs().max() < 0.3


@pytest.mark.parametrize("changes", [{"optimizer": "muon"}, {"optimizer": "prodigy"}])
def test_what_updates_all_at_once_does_not_step_in_backward(data, changes):
    with pytest.raises(ValueError, match="step_in_backward is set"):
        config(data, learning_rate=1.0, step_in_backward=True, **changes)


def test_each_block_is_compiled_once(data, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    model = load_model(CHECKPOINT, dtype=torch.float32)
    prepare(model, config(data, compile_blocks=True))
    blocks = len(model.layers) + len(model.noise_refiner) + len(model.context_refiner)
    assert len(compiled) == blocks


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": 8.0, "lora_targets": ("attention",)},
        {"lora_kind": "lokr", "lora_alpha": 2.0},
        {"lora_kind": "dora", "lora_alpha": 8.0},
    ],
)
def test_a_saved_adapter_changes_the_model_as_it_was_trained(data, changes):
    """The model in training, against the published one with the file loaded."""
    settings = config(data, steps=2, batch=1, lora_rank=4, learning_rate=0.01, **changes)
    run = training.Run(settings, False)
    file = run.train()
    x, time = torch.randn(1, 3, 96, 96), torch.tensor([0.3])
    prompts = [torch.randn(7, 96)]
    pipe = L2PPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)
    with torch.no_grad():
        before = pipe.transformer(x, time, prompts)
        trained = run.pipe.transformer(x, time, prompts)
        pipe.load_lora(file)
        loaded = pipe.transformer(x, time, prompts)
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(loaded, trained, atol=1e-4, rtol=1e-3)
    names = set(load_file(file))
    assert any("adaLN" in name for name in names) == ("lora_targets" not in changes)


def test_noise_levels_and_weights_are_their_papers():
    torch.manual_seed(0)
    draws = torch.Generator().manual_seed(0)
    levels = {
        kind: training_sigmas(20_000, kind, 3.0, 16, draws)
        for kind in ("uniform", "logit-normal", "mode", "shifted")
    }
    assert all(0 < each.min() and each.max() <= 1 for each in levels.values())
    # A share of the middle above that of even levels, and of the ends above logit-normal's.
    middle = {kind: ((0.4 < each) & (each < 0.6)).float().mean() for kind, each in levels.items()}
    ends = {kind: (each > 0.98).float().mean() for kind, each in levels.items()}
    assert middle["mode"] > 1.5 * middle["uniform"] and ends["mode"] > 10 * ends["logit-normal"]
    # The median of even levels, shifted: 3 * 0.5 / (1 + 2 * 0.5).
    assert levels["shifted"].median() == pytest.approx(0.75, abs=0.01)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    snr = torch.tensor([81.0, 1.0, 1 / 81])
    wanted = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1)
    torch.testing.assert_close(loss_weights("min-snr", sigma), wanted)
    cosmap = loss_weights("cosmap", torch.tensor([0.0, 0.5, 1.0]))
    assert cosmap[1] == pytest.approx(2 * cosmap[0]) and cosmap[0] == cosmap[2]
