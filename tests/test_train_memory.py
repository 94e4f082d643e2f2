"""What saves memory in training, each against training without it; and the estimate against what a
step really holds."""

import math
import warnings

import bitsandbytes
import pytest
import torch
from comfyui_l2p.l2p_core import load_model
from comfyui_l2p.l2p_core.flow import flow_matching_loss
from comfyui_l2p.l2p_core.meter import Meter, bytes_of
from comfyui_l2p.l2p_core.train import prepare as preparing
from comfyui_l2p.l2p_core.train import run as training
from comfyui_l2p.l2p_core.train.estimate import estimate, state_in_8_bits
from comfyui_l2p.l2p_core.train.low_memory import FrozenLinear, round_stochastically
from safetensors.torch import load_file
from small_runs import CHECKPOINT, Killed, config, losses
from torch.utils._pytree import tree_leaves

LOSS = training.Run.loss  # as it is before a test replaces it


def trained_by(data, name, **changes):
    """The step file's tensors of a run of six steps."""
    return load_file(
        training.train(config(data, output=str(data.parent / name), **changes), progress=False)
    )


def moved(after):
    """Each tensor's way from the checkpoint, all in one vector, in float64."""
    before = load_file(CHECKPOINT)
    return torch.cat(
        [(tensor.double() - before[name].double()).flatten() for name, tensor in after.items()]
    )


@pytest.mark.slow
@pytest.mark.parametrize("option", ["step_in_backward", "offload_state", "offload_activations"])
def test_what_only_moves_things_changes_nothing(data, option):
    wanted = trained_by(data, "plain", steps=3)
    found = trained_by(data, "saving", steps=3, **{option: True})
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
    plain, saving = losses(data.parent / "plain"), losses(data.parent / "saving")
    assert [loss for _, loss in saving] == pytest.approx([loss for _, loss in plain], rel=1e-5)


@pytest.mark.slow
def test_the_log_tells_the_gradients_length_whenever_it_is_summed(data):
    for name, option in (("plain", {}), ("saving", {"step_in_backward": True})):
        trained_by(data, name, steps=2, **option)
    norms = [
        [
            line.split(",")[3]
            for line in (data.parent / name / "log.csv").read_text().splitlines()[1:]
        ]
        for name in ("plain", "saving")
    ]
    assert [float(norm) for norm in norms[1]] == pytest.approx(
        [float(norm) for norm in norms[0]], rel=1e-4
    )
    assert float(norms[0][0]) > 0


@pytest.mark.slow
def test_8_bits_of_state_lead_almost_the_same_way(data):
    wanted, found = (
        moved(trained_by(data, "plain")),
        moved(trained_by(data, "saving", optimizer="adamw8bit")),
    )
    assert 1e-4 < (found - wanted).norm() / wanted.norm() < 0.2
    assert torch.dot(found, wanted) / found.norm() / wanted.norm() > 0.98


def test_rounding_up_or_down_keeps_the_mean():
    x = torch.full(
        (200_000,), 1 + 2**-7 * 0.3
    )  # three tenths of the way from 1 to the next bfloat16
    rounded = round_stochastically(x, torch.Generator().manual_seed(0)).float()
    assert set(rounded.tolist()) == {1.0, 1 + 2**-7}
    assert (rounded > 1).float().mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / len(x)))
    exact = torch.tensor([0.0, -1.5, 2.0**100, -(2.0**-100)])
    assert torch.equal(round_stochastically(exact).float(), exact)
    assert round_stochastically(
        -x, torch.Generator().manual_seed(0)
    ).float().mean() == pytest.approx(-x[0].item(), abs=1e-4)


def test_steps_too_small_for_bfloat16_still_count(data):
    """A hundred steps of a thousandth of what bfloat16 tells apart: rounded to the nearest, nothing
    would ever move."""
    settings = config(
        data, stochastic_rounding=True, mixed_precision="bf16", learning_rate=1e-5, weight_decay=0.0
    )
    weights = torch.nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
    optimizer = preparing.make_optimizer({"weights": weights}, settings)
    for _ in range(100):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    assert weights.detach().float().mean() == pytest.approx(1 - 100 * 1e-5, abs=6e-5)
    assert weights.dtype == torch.bfloat16


@pytest.mark.parametrize("kind, error", [("int8", 0.01), ("nf4", 0.11)])
def test_a_frozen_linear_is_its_weight_and_lets_gradients_through(kind, error):
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 192, bias=False)
    frozen = FrozenLinear(linear, kind)
    weight = frozen.unpacked(torch.float32)
    assert 0 < (weight - linear.weight).norm() / linear.weight.norm() < error
    assert frozen.weight.nbytes == linear.weight.numel() // (2 if kind == "nf4" else 1)
    x, y = (torch.randn(2, 5, 256).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    found, wanted = frozen(x), torch.nn.functional.linear(y, weight)
    torch.testing.assert_close(found, wanted)
    for output in (found, wanted):
        output.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.slow
@pytest.mark.parametrize("kind, near", [("int8", 0.02), ("nf4", 0.25)])
@pytest.mark.parametrize("lora", [0, 4])
def test_frozen_layers_in_few_bits_train_almost_the_same(data, kind, near, lora):
    for name, option in (("plain", {}), ("saving", {"quantize_frozen": kind})):
        trained_by(data, name, lora_rank=lora, freeze="0:-1", steps=3, **option)
    plain, saving = (
        [loss for _, loss in losses(data.parent / name)] for name in ("plain", "saving")
    )
    assert saving == pytest.approx(plain, rel=near)
    assert saving != plain


EVERYTHING = {
    "mixed_precision": "bf16",
    "optimizer": "adamw8bit",
    "stochastic_rounding": True,
    "step_in_backward": True,
    "quantize_frozen": "nf4",
    "offload_activations": True,
}


@pytest.mark.slow
def test_with_all_of_it_a_killed_run_goes_on_bit_for_bit(data, monkeypatch):
    wanted, calls = trained_by(data, "whole", **EVERYTHING), []

    def dies(*args):
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return LOSS(*args)

    monkeypatch.setattr(training.Run, "loss", dies)
    with pytest.raises(Killed):
        trained_by(data, "halves", **EVERYTHING)
    monkeypatch.setattr(training.Run, "loss", LOSS)
    found = trained_by(data, "halves", **EVERYTHING)
    assert losses(data.parent / "halves") == losses(data.parent / "whole")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    "changes, words",
    [({"accumulate": 2}, "accumulate 2"), ({"max_grad_norm": 1.0}, "max_grad_norm 1")],
)
def test_a_step_in_backward_is_rejected_where_gradients_must_meet(data, changes, words):
    with pytest.raises(ValueError, match=words):
        config(data, step_in_backward=True, **changes)


# The estimate


def parts(data, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that bfloat16 and float32 meet in a norm
        return estimate(config(data, height=96, width=96, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("precision, frozen_bytes", [("bf16", 2), ("no", 4)])
def test_the_estimate_counts_weights_gradients_and_state(data, precision, frozen_bytes):
    model = load_model(CHECKPOINT, dtype=torch.float32)
    frozen = sum(parameter.numel() for parameter in model.layers[1:-1].parameters())
    trained = sum(parameter.numel() for parameter in model.parameters()) - frozen
    count = len(preparing.prepare(model, config(data)))
    found = parts(data, mixed_precision=precision)
    assert found["weights that are trained"] == found["gradients"] == 4 * trained
    assert found["frozen weights"] == frozen_bytes * frozen
    assert found["optimizer state"] == 8 * trained + 4 * count, (
        "two means of each number, and a count of steps for each tensor"
    )
    assert found["total"] == sum(size for name, size in found.items() if name != "total")


@pytest.mark.slow
def test_the_estimate_knows_what_saves_memory(data):
    passing = "activations and buffers"
    plain = parts(data, checkpointing=False)
    saving = parts(data)
    assert saving[passing] < plain[passing] / 2
    assert (
        3.5 * plain[passing]
        < parts(data, batch=8, checkpointing=False)[passing]
        < 4.5 * plain[passing]
    )
    assert parts(data, lora_rank=4)["optimizer state"] < saving["optimizer state"] / 5
    assert parts(data, checkpointing=False, offload_activations=True)[passing] < plain[passing] / 2
    assert parts(data, quantize_frozen="int8")["frozen weights"] < 0.5 * saving["frozen weights"]
    assert parts(data, step_in_backward=True)["gradients"] == 0
    away = parts(data, offload_state=True)
    assert away["optimizer state"] == 0 and away["in the CPU's memory"] == saving["optimizer state"]
    assert (
        parts(data, stochastic_rounding=True, mixed_precision="bf16")["weights that are trained"]
        == saving["weights that are trained"] / 2
    )


def test_the_estimate_knows_the_size_of_8_bit_state(data):
    for count in (100, 4095, 4096, 100_001):
        weights = torch.nn.Parameter(torch.ones(count))
        optimizer = bitsandbytes.optim.AdamW8bit([weights])
        weights.grad = torch.ones(count)
        optimizer.step()
        assert state_in_8_bits(count) == bytes_of(tree_leaves(optimizer.state_dict())), count


@pytest.mark.slow
def test_the_estimate_is_what_a_real_step_holds(data):
    """The same meter over real tensors: so shapes alone take the same path."""
    settings = config(data, mixed_precision="no")
    model = load_model(CHECKPOINT, dtype=torch.float32)
    optimizer = preparing.make_optimizer(preparing.prepare(model, settings), settings)
    inputs = (
        torch.randn(2, 3, 96, 96),
        [torch.randn(512, 96) for _ in range(2)],
        torch.randn(2, 3, 96, 96),
        torch.rand(2),
    )
    flow_matching_loss(model, *inputs).backward()
    optimizer.step()
    optimizer.zero_grad()
    gradients = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    with Meter() as meter:
        flow_matching_loss(model, *inputs).backward()
        optimizer.step()
    assert meter.peak() - gradients == pytest.approx(
        parts(data, mixed_precision="no")["activations and buffers"], rel=0.02
    )


@pytest.mark.slow
def test_estimating_leaves_nothing_behind(data, tiny_model, golden):
    recorded = golden("dit_fp32")
    inputs = recorded["input.image.64x128"], torch.tensor([0.3]), [recorded["input.caption.7"]]
    before = tiny_model(*inputs)
    parts(data)
    assert torch.equal(tiny_model(*inputs), before)
