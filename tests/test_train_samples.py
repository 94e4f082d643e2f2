"""Samples with settings of their own, and the boards that show them."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import L2PPipeline
from comfyui_l2p.l2p_core.train.run import train
from helpers import apart
from PIL import Image
from small_runs import CHECKPOINT, config

pytest.importorskip("accelerate")  # which looks for wandb once, before a stand-in takes its place

ROWS = """prompt,height,width,seed,cfg_scale,num_inference_steps,negative_prompt
a red circle,64,96,7,1.5,3,a blue star
a star,,,,,,
"""


class Board:
    """What was logged, in place of a TensorBoard writer and of a run of wandb."""

    def __init__(self):
        self.numbers, self.images, self.texts = {}, {}, []

    def add_scalar(self, name, value, step):
        self.numbers[name, step] = value

    def add_image(self, name, pixels, step, dataformats):
        self.images[step] = pixels

    def add_text(self, name, text, step):
        self.texts.append(text)

    def log(self, values, step):
        self.numbers |= {(name, step): value for name, value in values.items()}

    def close(self):
        self.closed = True

    finish = close


@pytest.fixture
def boards(monkeypatch):
    """Stand-ins for both, TensorBoard's first."""
    tensorboard, wandb = Board(), Board()

    def start(**settings):
        wandb.settings = settings
        return wandb

    monkeypatch.setitem(
        sys.modules,
        "torch.utils.tensorboard",
        SimpleNamespace(SummaryWriter=lambda folder, purge_step: tensorboard),
    )
    monkeypatch.setattr(
        torch.utils, "tensorboard", sys.modules["torch.utils.tensorboard"], raising=False
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=start, Image=np.asarray))
    return tensorboard, wandb


@pytest.mark.slow
def test_samples_have_the_settings_of_their_row_and_go_to_the_boards(data, boards):
    file = data.parent / "samples.csv"
    file.write_text(ROWS)
    settings = config(
        data, steps=1, sample_every=1, sample_steps=2, sample_file=str(file), wandb_project="shapes"
    )
    train(settings, progress=False)
    sheet = Image.open(data.parent / "run" / "samples" / "step-0000000.png")
    pipe = L2PPipeline.from_pretrained(CHECKPOINT, torch_dtype=torch.float32)

    def encoded(prompt):  # as captions are, word for word
        return pipe.text_encoder.encode(prompt)

    first = pipe(
        prompt_embeds=encoded("a red circle"),
        negative_prompt_embeds=encoded("a blue star"),
        height=64,
        width=96,
        seed=7,
        cfg_scale=1.5,
        num_inference_steps=3,
    )
    second = pipe(
        prompt_embeds=encoded("a star"), height=96, width=96, seed=1, num_inference_steps=2
    )
    assert sheet.size == (192, 96)
    assert apart(sheet.crop((0, 0, 96, 64)), first) <= 1
    assert apart(sheet.crop((96, 0, 192, 96)), second) <= 1

    tensorboard, wandb = boards
    assert np.array_equal(tensorboard.images[0], sheet) and set(tensorboard.images) == {0, 1}
    assert np.array_equal(wandb.numbers["samples", 0], sheet)
    assert 'wandb_project = "shapes"' in tensorboard.texts[0]
    assert wandb.settings["project"] == "shapes" and wandb.settings["config"]["steps"] == 1
    for board in boards:
        assert board.numbers["loss", 1] > 0 and board.closed


@pytest.mark.parametrize(
    "rows, words",
    [
        ("prompt,height\na,64\nb,65\n", r"samples.csv, sample 2: .*65"),
        ("prompt,input_image\na,x.png\n", "sample 1: input_image is not for samples"),
        ("prompt,cfg_scale\na,high\n", "sample 1: cfg_scale is 'high'"),
        ("prompt,color\na,red\n", "unknown column color"),
    ],
)
def test_samples_that_do_not_fit_are_named_before_images_are_read(data, rows, words):
    file = data.parent / "samples.csv"
    file.write_text(rows)
    (data / "images" / "0.png").unlink()
    with pytest.raises(ValueError, match=words):
        train(config(data, sample_file=str(file)), progress=False)


def test_what_wandb_needs_is_said_first(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"comfyui-l2p\[wandb\]"):
        train(config(data, wandb_project="shapes"), progress=False)
