"""Ctrl-C and SIGTERM at awkward moments: one sentence, the status that shells have for it, and
nothing lost."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from comfyui_l2p.l2p_core.interrupt import Terminated, noted
from comfyui_l2p.l2p_core.model import L2PTransformer
from comfyui_l2p.l2p_core.train import run as training
from small_runs import config

LOSS = training.Run.loss  # as it is before a test replaces it

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SLOW = """
import time
print("importing", flush=True)
try:
    time.sleep(600)
except BaseException as error:  # as libraries do
    raise ImportError("half imported") from error
"""


def run_cli(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "comfyui_l2p.l2p_core.cli", *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize(
    "library, command",
    [
        ("torch", ["generate", "a circle"]),
        ("torch", ["train"]),
        ("torch", ["inspect", "x"]),
        ("torch", ["--help"]),
        ("safetensors", ["train"]),
        ("tqdm", ["quantize", "x", "-o", "y"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_while_libraries_are_imported(tmp_path, number, library, command):
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(SLOW)
    process = run_cli(*command, PYTHONPATH=str(tmp_path))
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    said, wrong = process.communicate(timeout=60)
    assert (process.returncode, said, wrong) == (
        STATUS[number],
        "",
        "l2p: stopped. Nothing was changed\n",
    )


def test_a_background_job_keeps_ignoring_ctrl_c(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(SLOW.replace("600", "1"))
    process = subprocess.Popen(
        [sys.executable, "-m", "comfyui_l2p.l2p_core.cli", "inspect", "x"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, wrong = process.communicate(timeout=60)
    assert "stopped" not in wrong and process.returncode not in STATUS.values()


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS)
def test_while_images_are_generated(tmp_path, number):
    process = run_cli(
        "generate", "a circle", "-o", tmp_path / "out.png", "--steps", "1000", "--device", "cpu"
    )
    seen = ""
    while "step/s" not in seen:
        seen += process.stderr.read(1)
        assert process.poll() is None, seen
    process.send_signal(number)
    _, wrong = process.communicate(timeout=60)
    assert (
        process.returncode == STATUS[number]
        and "l2p: stopped." in wrong
        and "Traceback" not in wrong
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS)
def test_within_two_seconds_while_samples_are_generated(data, number):
    run = data.parent / "run"
    settings = {
        "checkpoint": config(data).checkpoint,
        "data": data,
        "output": run,
        "steps": 4,
        "sample-every": 2,
        "sample-steps": 1000,
        "sample-prompts": "a star",
        "device": "cpu",
        "save-every": 100,
    }
    process = run_cli(
        "train", *[word for name, value in settings.items() for word in (f"--{name}", value)]
    )
    until = time.monotonic() + 120
    while not (run / "config.toml").exists():  # its first samples, before the first step, follow
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    began = time.monotonic()
    _, wrong = process.communicate(timeout=60)
    assert time.monotonic() - began < 2, "seconds, as docs/reliability.md promises"
    assert (
        process.returncode == STATUS[number]
        and "l2p: stopped." in wrong
        and "Traceback" not in wrong
    )
    assert not list(run.rglob("*.l2p-*"))


@pytest.mark.parametrize(
    "number, error", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_the_first_is_noted_and_says_which_it_was(number, error):
    with noted() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.is_set() and type(asked.error()) is error


@pytest.mark.slow
@pytest.mark.parametrize("sample_every, save_every, saved", [(2, 100, 2), (2, 2, 2), (3, 2, 3)])
def test_sigterm_while_sampling_ends_within_a_pass_and_keeps_every_step(
    data, monkeypatch, sample_every, save_every, saved
):
    passes, real, model = [], training.Run.sample, L2PTransformer.forward

    def sample(self):
        if self.step:
            assert torch.load(self.output / "resume.pt")["step"] == self.step, (
                "saved before samples are generated"
            )
            os.kill(os.getpid(), signal.SIGTERM)
            passes.clear()
        real(self)

    def counted(self, *args, **kwargs):
        passes.append(1)
        return model(self, *args, **kwargs)

    monkeypatch.setattr(training.Run, "sample", sample)
    monkeypatch.setattr(L2PTransformer, "forward", counted)
    with pytest.raises(Terminated):
        training.train(
            config(
                data,
                sample_every=sample_every,
                save_every=save_every,
                sample_steps=5,
                sample_prompts=("a star",),
            ),
            progress=False,
        )
    assert len(passes) <= 1
    assert torch.load(data.parent / "run" / "resume.pt")["step"] == saved
    assert not training.samples_file(data.parent / "run", saved).exists()


def test_while_the_validation_loss_is_computed(data, monkeypatch):
    def loss(*args):
        if not torch.is_grad_enabled():
            os.kill(os.getpid(), signal.SIGINT)
        return LOSS(*args)

    monkeypatch.setattr(training.Run, "loss", loss)
    with pytest.raises(KeyboardInterrupt):
        training.train(
            config(data, sample_every=2, sample_steps=1, held_out=2, batch=1), progress=False
        )
    assert not (data.parent / "run" / "held_out.csv").exists()


@pytest.mark.slow
def test_between_the_batches_of_a_step(data, monkeypatch):
    """Eight batches make a step: what is missing of it is not waited for, and the steps before it
    are saved."""
    calls = []

    def loss(*args):
        calls.append(1)
        if len(calls) == 18:  # the second batch of step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return LOSS(*args)

    monkeypatch.setattr(training.Run, "loss", loss)
    settings = config(data, accumulate=8, steps=4, save_every=100)
    with pytest.raises(Terminated):
        training.train(settings, progress=False)
    assert len(calls) == 18 and torch.load(data.parent / "run" / "resume.pt")["step"] == 2
    found = training.train(settings, progress=False)
    whole = training.train(
        config(data, accumulate=8, steps=4, save_every=100, output=str(data.parent / "whole")),
        progress=False,
    )
    one, other = (
        training.torch.load(path.parent / "resume.pt")["tensors"] for path in (found, whole)
    )
    assert one.keys() == other.keys() and all(
        torch.equal(one[name], tensor) for name, tensor in other.items()
    )
