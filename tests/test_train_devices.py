"""What only a GPU or a cluster would show of training, told without either: by counting calls, by
stand-ins for devices and processes, and by torch's dispatcher."""

import warnings
from contextlib import suppress
from types import SimpleNamespace

import bitsandbytes.optim.optimizer as bitsandbytes_optimizer
import pytest
import torch
import torch.distributed as dist
from comfyui_l2p.l2p_core import load_model
from comfyui_l2p.l2p_core.flow import flow_matching_loss
from comfyui_l2p.l2p_core.train import launch, pause, transfer
from comfyui_l2p.l2p_core.train import run as training
from comfyui_l2p.l2p_core.train.estimate import fused_norm
from comfyui_l2p.l2p_core.train.low_memory import FrozenLinear
from comfyui_l2p.l2p_core.train.prepare import make_optimizer, prepare
from comfyui_l2p.l2p_core.train.shard import shard
from small_runs import CHECKPOINT, config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """The operations that reach a kernel: (name, arguments)."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made.append((function._schema.name, args))
        return function(*args, **(kwargs or {}))

    def named(self, name):
        return [args for found, args in self.made if found == name]


def parameters(count=3):
    torch.manual_seed(0)
    made = {str(number): nn.Parameter(torch.randn(64, 96)) for number in range(count)}
    for parameter in made.values():
        parameter.grad = torch.randn_like(parameter)
    return made


def test_8_bit_adamw_never_waits_for_the_gpu(data, monkeypatch):
    waits = []
    ours, theirs = parameters(), parameters()
    optimizer = make_optimizer(ours, config(data, optimizer="adamw8bit"))
    peer = bitsandbytes_optimizer.Optimizer2State  # AdamW8bit's class
    own = [
        type(next(iter(optimizer.each.values())))(
            [each], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
        )
        for each in theirs.values()
    ]
    assert isinstance(own[0], peer)
    monkeypatch.setattr(bitsandbytes_optimizer, "sync_gpu", waits.append)
    optimizer.step()
    assert not waits
    for each in own:
        each.step()
    assert len(waits) == len(own)  # so its own step does wait
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name])


def test_state_on_the_cpu_is_updated_by_one_kernel_a_tensor(data):
    optimizer = make_optimizer(trained := parameters(), config(data, offload_state=True))
    with Calls() as calls:
        optimizer.step()
    assert len(calls.named("aten::_fused_adamw_")) == len(trained)
    assert not calls.named("aten::addcdiv_")


@pytest.fixture
def pretended_gpu(monkeypatch):
    """Every tensor counts as a GPU's. What happens, in order: copies with whether they are queued
    and between pinned memory, and events waited for."""
    told, pins = [], set()

    def pinned_like(tensor, dtype=None):
        made = torch.empty(tensor.shape, dtype=dtype or tensor.dtype)
        pins.add(made.data_ptr())
        return made

    class Event:
        made = 0

        def record(self):
            Event.made += 1
            self.number = Event.made
            told.append(("event", self.number))

        def synchronize(self):
            told.append(("waited", self.number))

    def copy(self, source, non_blocking=False):
        if non_blocking:
            assert self.data_ptr() in pins or source.data_ptr() in pins
        told.append(("copy", non_blocking))
        return real_copy(self, source, non_blocking)

    real_copy = torch.Tensor.copy_
    monkeypatch.setattr(transfer, "is_gpu", lambda device: True)
    monkeypatch.setattr(transfer, "pinned_like", pinned_like)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    return told


def test_copies_to_the_cpu_are_queued_before_the_last_tensor_is_waited_for(data, pretended_gpu):
    optimizer = make_optimizer(trained := parameters(), config(data, offload_state=True))
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer.step()
    told = [entry for entry in pretended_gpu if entry[0] != "copy" or entry[1]]
    out, back = [("copy", True)] * 2, [("copy", True)]  # weight and gradient; weight
    events = [[("event", number)] for number in (1, 2, 3)]
    waits = [[("waited", number)] for number in (1, 2, 3)]
    first, second, third = (out + event for event in events)
    assert told == first + second + waits[0] + back + third + waits[1] + back + waits[2] + back
    assert all(not torch.equal(trained[name], tensor) for name, tensor in before.items())


def test_saved_tensors_are_queued_too(pretended_gpu):
    x = torch.randn(8, 8, requires_grad=True)
    with transfer.saved_on_host():
        y = (x.exp() * x).sum()
    y.backward()
    assert pretended_gpu and all(queued for _, queued in pretended_gpu)
    torch.testing.assert_close(x.grad, (x.exp() * (x + 1)).detach())


def test_float32_throughout_is_no_tf32(data, monkeypatch):
    kinds, seen = (torch.backends.cuda.matmul, torch.backends.cudnn), []

    class Looks:
        def __init__(self, *_):
            seen.append([kind.allow_tf32 for kind in kinds])

        def train(self):
            return self

    monkeypatch.setattr(training, "find_recipe", lambda name: Looks)
    for precision in ("no", "bf16"):
        training.train(config(data, mixed_precision=precision))
    default = [kind.allow_tf32 for kind in kinds]
    assert seen == [[False, False], default] and default[1]


def test_a_row_scale_of_int8_is_not_rounded(data):
    """A factor common to a row does not average out, as the rounding of its numbers does."""
    torch.manual_seed(0)
    linear = nn.Linear(3840, 256, bias=False)
    weight = linear.weight.detach()
    found = FrozenLinear(linear, "int8").unpacked(torch.bfloat16).float()
    gain = (found * weight).sum(1) / weight.square().sum(1)
    assert (gain - 1).abs().max() < 2e-3  # 4e-3 with the scale in bfloat16


@pytest.mark.slow
def test_a_pass_keeps_no_weights_cast_to_bfloat16(data, monkeypatch):
    seen, loss = [], training.Run.loss

    def looks(run, batch):
        seen.append(torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
        return loss(run, batch)

    monkeypatch.setattr(training.Run, "loss", looks)
    training.train(config(data, steps=1, batch=1, mixed_precision="bf16"), progress=False)
    assert seen == [False]


@pytest.mark.slow
def test_a_split_model_gathers_weights_as_they_are_computed_with(data):
    """One of two processes, the other of which never answers: torch's fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        model = load_model(CHECKPOINT, dtype=torch.float32)
        prepare(model, config(data))
        shard(model, torch.device("cpu"), weights=True, dtype=torch.bfloat16)
        inputs = torch.zeros(1, 3, 96, 96), torch.zeros(1), [torch.zeros(7, 96)]
        with Calls() as calls, torch.autocast("cpu", torch.bfloat16):
            model(*inputs).sum().backward()
    finally:
        dist.destroy_process_group()
    gathered = {args[0].dtype for args in calls.named("c10d::_allgather_base_")}
    summed = {args[0].dtype for args in calls.named("c10d::_reduce_scatter_base_")}
    assert gathered == {torch.bfloat16}
    assert summed == {torch.float32}


@pytest.mark.slow
def test_the_launchers_accumulation_and_precision_change_no_gradients(data, monkeypatch):
    norms = []
    for number, precision, name in (("1", "no", "one"), ("4", "fp16", "four")):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", number)
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        with warnings.catch_warnings(record=True) as said:
            run = training.Run(config(data, steps=1, output=str(data.parent / name)), False)
        run.train()
        norms.append(run.log.rows[0].grad_norm)
        timeouts = [run.accelerator.init_handler.timeout]
    assert norms[1] == norms[0]
    messages = " ".join(str(each.message) for each in said)
    assert "over 4 batches, which is ignored" in messages
    assert "set to fp16, which is ignored" in messages
    assert all(timeout.total_seconds() <= 3600 for timeout in timeouts)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_a_launcher_set_up_for_another_split_is_told_of_shard(data, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="--shard state"):
        training.train(config(data), progress=False)


@pytest.mark.slow
def test_the_bar_tells_the_memory_of_steps_alone(data, monkeypatch):
    told = []
    monkeypatch.setattr(training, "reset_peak", lambda device: told.append("reset"))
    monkeypatch.setattr(training, "memory", lambda device: told.append("shown") or {})
    monkeypatch.setattr(training.Run, "sample", lambda run: told.append("sampled"))
    training.train(config(data, steps=2, batch=1, sample_every=2, save_every=9), progress=False)
    assert told == ["sampled", "reset", "shown", "shown", "sampled", "reset"]
    forgotten = []
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    launch.reset_peak(torch.device("cpu"))
    launch.reset_peak(torch.device("cuda:1"))
    assert forgotten == [torch.device("cuda:1")]


def test_a_card_without_bfloat16_is_rejected_by_name(data, monkeypatch):
    capability = {"cuda:0": (7, 5), "cuda:1": (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability[str(card)])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda card: "RTX 2080")
    check = launch.check_dtype
    with pytest.raises(ValueError, match="RTX 2080 .*7.5.* mixed_precision 'no'"):
        check(config(data, mixed_precision="bf16"), torch.device("cuda:0"))
    check(config(data, mixed_precision="bf16"), torch.device("cuda:1"))
    check(config(data, mixed_precision="no"), torch.device("cuda:0"))
    check(config(data, mixed_precision="bf16"), torch.device("cpu"))


def test_processes_share_the_samples_and_each_others_troubles(data, monkeypatch):
    run = training.Run.__new__(training.Run)
    run.config, run.samples, run.main, run.output, run.step = config(data), "abcde", True, data, 1
    run.log = SimpleNamespace(boards=None)
    run.processes, run.rank = 2, 1
    asked, shown, others = [], [], ({0: "A", 2: "C", 4: "E"}, False, "")

    def generate(seeds):
        asked.extend(seeds)
        return {seed: "ABCDE"[seed] for seed in seeds}

    run.generate = generate
    monkeypatch.setattr(training, "show_samples", lambda images, *_: shown.extend(images))
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [others, *own])
    run.sample()
    assert asked == [1, 3] and shown == list("ABCDE")
    others = ({}, False, "out of memory")
    with pytest.raises(RuntimeError, match="out of memory"):
        run.sample()
    others = ({}, True, "")
    with pytest.raises(pause.Stopped):
        run.sample()


@pytest.mark.slow
def test_nothing_that_is_trained_is_cast_in_another_way_on_a_gpu(data, monkeypatch):
    """By torch's dispatch tables: under autocast, no operation on 16-bit numbers has a rule on one
    device alone. So the estimate, which runs on a CPU's shapes, has a GPU's dtypes."""
    model = load_model(CHECKPOINT, dtype=torch.bfloat16)
    prepare(model, config(data, mixed_precision="bf16"))
    differ, enabled = set(), [False]

    class Autocast(torch.autocast):
        """Tells whether it is on, which a dispatch mode can't see."""

        def __enter__(self):
            enabled.append(self._enabled)
            return super().__enter__()

        def __exit__(self, *error):
            enabled.pop()
            return super().__exit__(*error)

    monkeypatch.setattr(torch, "autocast", Autocast)

    def has_rule(function, device):
        """Of the overload, or of the operation's first, which may stand before it."""
        for name in (function.name(), function._schema.name):
            with suppress(RuntimeError):  # there is no overload of that name
                if torch._C._dispatch_has_kernel_for_dispatch_key(name, f"Autocast{device}"):
                    return True
        return False

    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            rules = {has_rule(function, device) for device in ("CPU", "CUDA")}
            halves = [x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16]
            if enabled[-1] and len(rules) > 1 and halves:
                differ.add(function._schema.name)
            return function(*args, **(kwargs or {}))

    inputs = torch.zeros(1, 3, 96, 96), [torch.zeros(7, 96)], torch.zeros(1, 3, 96, 96)
    features = torch.zeros(1, 4, 2, 2, dtype=torch.bfloat16)
    with Looks():
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_matching_loss(model, *inputs, torch.zeros(1))
            model.local_decoder.resize(features, (4, 4))
        loss.backward()
        differ.discard("aten::convolution")  # CUDA's rule is bfloat16, which it is given
        assert differ == set()
        with torch.autocast("cpu", torch.bfloat16):
            nn.functional.interpolate(features, scale_factor=2)
        assert differ == {"aten::upsample_nearest2d"}  # which the test would have seen


def test_the_estimate_counts_what_the_gpus_norm_keeps():
    x = torch.empty(3, 5, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight = torch.empty(64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    kernel = torch.ops.aten._fused_rms_norm(x.detach(), [64], weight.detach(), 1e-5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = fused_norm(x, [64], weight, 1e-5)
    assert (output.shape, output.dtype) == (kernel[0].shape, kernel[0].dtype)
    assert saved[0].data_ptr() == x.data_ptr() and saved[1].shape == weight.shape
    assert saved[2].nbytes == kernel[1].nbytes and saved[2].dtype == kernel[1].dtype
    output.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and weight.grad.shape == weight.shape
