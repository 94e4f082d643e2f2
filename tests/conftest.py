"""The recorded numbers, the tiny model they were recorded with, and a place to write its
checkpoints."""

import os
import signal

import comfyui_stand_ins
import pytest
import real_comfyui
import serving
import small_runs
import torch
from comfyui_l2p.l2p_core.config import L2PConfig
from comfyui_l2p.l2p_core.model import L2PTransformer
from golden import recipe
from helpers import GOLDEN, rms
from safetensors.torch import load_file, save_file

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a background job ignores it, and so would the programs that tests start


@pytest.fixture(scope="session")
def golden():
    """golden("dit_fp32") → the tensors of that file of recorded numbers."""
    recipe.selfcheck()
    return lambda name: load_file(GOLDEN / f"{name}.safetensors")


@pytest.fixture(scope="session")
def tiny_weights():
    return recipe.torch_weights(recipe.TINY)


@pytest.fixture(scope="session")
def tiny_model(tiny_weights):
    model = L2PTransformer(L2PConfig.from_shapes(recipe.shapes(recipe.TINY)))
    model.load_state_dict(tiny_weights)
    return model.eval()


@pytest.fixture
def write(tmp_path):
    """write(tensors, name="model.safetensors", metadata=None) → path."""

    def writer(tensors, name="model.safetensors", metadata=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=metadata
        )
        return path

    return writer


COMFYUI_FIXTURES = {"comfyui", "newest_comfyui", "comfyui_server"}


def pytest_configure(config):
    """Let each test process compute on one core. With two threads each they would wait for each
    other most of the time."""
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark what needs a ComfyUI or a browser, by its fixtures. Tests of one group run in one
    process: those of a file, and all that share the ComfyUI."""
    for item in items:
        asked = set(getattr(item, "fixturenames", ()))
        group = "comfyui" if asked & COMFYUI_FIXTURES else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
        if asked & COMFYUI_FIXTURES:
            item.add_marker("comfyui")
        if asked & {"page", "browser"}:
            item.add_marker("browser")


def real(kind, folder):
    """That part of a real ComfyUI, until the tests are over; skips where there is none."""
    found = real_comfyui.find()
    if isinstance(found, str):
        pytest.skip(found)
    started = kind(*found, folder)
    yield started
    started.close()


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    """A `real_comfyui.Worker`; tests that ask for it are skipped where there is no ComfyUI."""
    yield from real(real_comfyui.Worker, tmp_path_factory.mktemp("comfyui"))


@pytest.fixture
def compare(comfyui, tmp_path):
    """compare(path, loader, reference model) → (relative error of ComfyUI's output, what it
    loaded)."""

    def run(path, loader, reference, height=64, width=96, batch=2, call="forward", **options):
        config = reference.config
        generator = torch.Generator().manual_seed(1)
        image = torch.randn(batch, 3, height, width, generator=generator)
        sigma = torch.linspace(0.9, 0.3, batch)
        caption = torch.randn(batch, 21, config.cap_feat_dim, generator=generator)
        save_file(
            {"image": image, "sigma": sigma, "caption": caption}, tmp_path / "inputs.safetensors"
        )
        arguments = {
            "path": path,
            "inputs": tmp_path / "inputs.safetensors",
            "output": tmp_path / "output.safetensors",
        }
        loaded = comfyui.call(
            call, **arguments, **({"loader": loader} if loader else {}), **options
        )
        with torch.no_grad():
            expected = -reference(image, 1 - sigma, list(caption))
        return (
            rms(load_file(tmp_path / "output.safetensors")["output"] - expected, expected),
            loaded,
        )

    return run


@pytest.fixture(scope="session")
def newest_comfyui(tmp_path_factory):
    """A `real_comfyui.Worker` in the stand-in for the newest ComfyUI; skips where there is none to
    make it from."""
    found = real_comfyui.find()
    if isinstance(found, str):
        pytest.skip(found)
    root, python = found
    copy = comfyui_stand_ins.make_stand_in(root, tmp_path_factory.mktemp("stand_in"))
    started = real_comfyui.Worker(copy, python, tmp_path_factory.mktemp("newest_comfyui"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def comfyui_server(tmp_path_factory):
    """A `real_comfyui.Server`; tests that ask for it are skipped where there is no ComfyUI."""
    yield from real(real_comfyui.Server, tmp_path_factory.mktemp("comfyui_server"))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running `l2p serve`; server.temporary is its folder for temporary files."""
    temporary = tmp_path_factory.mktemp("temporary")
    flags = ("--max-queue", "20", "--max-upload-mb", "1")
    with serving.serving(*flags, TMPDIR=str(temporary)) as started:
        started.temporary = temporary
        yield started


@pytest.fixture
def data(tmp_path):
    """A folder to train on."""
    return small_runs.make_data(tmp_path / "data")
