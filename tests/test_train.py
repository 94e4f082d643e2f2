"""The trainer against the published run's numbers, against itself stopped and gone on, and against
its own one-process run."""

import base64
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_l2p.l2p_core import CheckpointError, L2PConfig, L2PTransformer, load_model
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.files.atomic import AlreadyRunning
from comfyui_l2p.l2p_core.flow import flow_matching_loss, schedule, training_sigmas
from comfyui_l2p.l2p_core.images import to_pixels
from comfyui_l2p.l2p_core.interrupt import noted
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL, L2PPipeline, draw_noise
from comfyui_l2p.l2p_core.shapes.scenes import scenes
from comfyui_l2p.l2p_core.text import TextEncoder
from comfyui_l2p.l2p_core.train import prepare as preparing
from comfyui_l2p.l2p_core.train import record
from comfyui_l2p.l2p_core.train import resume as resuming
from comfyui_l2p.l2p_core.train import run as training
from comfyui_l2p.l2p_core.train.config import read_config, to_toml
from comfyui_l2p.l2p_core.train.data import (
    Batches,
    Example,
    crop_and_resize,
    hold_out,
    plan_epoch,
    read_examples,
    target_size,
)
from comfyui_l2p.l2p_core.train.optimizers import PerTensorOptimizer
from comfyui_l2p.quant.merge import merge
from golden import recipe
from helpers import GOLDEN, rms
from PIL import Image
from safetensors.torch import load_file, save_file
from small_runs import CHECKPOINT, Killed, config, losses, make_data

LOSS = training.Run.loss  # as it is before a test replaces it

RECORDED = json.loads((GOLDEN / "training.json").read_text())


# The objective and the optimiser


@pytest.mark.slow
def test_seven_steps_are_the_published(golden, tiny_weights, tmp_path):
    recorded, run = golden("training_fp32"), RECORDED["adamw_7_steps"]
    model = L2PTransformer(L2PConfig.from_shapes(recipe.shapes(recipe.TINY)))
    model.load_state_dict(tiny_weights)
    settings = config(tmp_path, learning_rate=5e-5, freeze="5:-5", checkpointing=False)
    trained = preparing.prepare(model, settings)
    model.double()  # some CPUs' float32 convolution gradients are off by 2e-4
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = preparing.make_optimizer(trained, settings)
    image = to_pixels(Image.fromarray(recorded["input.image_u8.64x128"].numpy())).double()
    caption, noise = (
        recorded["input.caption.7"].double(),
        recorded["input.noise.64x128.seed77"].double(),
    )
    for step, wanted in enumerate(run["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * preparing.rate_at(step, settings)
        assert group["lr"] == pytest.approx(wanted["lr"])
        loss = flow_matching_loss(
            model, image, [caption], noise, schedule(500)[wanted["timestep_id"]][None].double()
        )
        assert loss.item() == pytest.approx(wanted["loss"], rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = {
        name.removeprefix("adamw_7_steps."): tensor
        for name, tensor in recorded.items()
        if name.startswith("adamw_7_steps.")
    }
    assert len(after) == 3
    for name, tensor in after.items():
        assert rms(trained[name].detach() - tensor, tensor - before[name]) < 1e-3, name
    for name, norm in run["parameter_delta_norms_after"].items():
        # recorded in float32, where a change of 1e-4 to a norm's weight of 1 is known to 1e-3
        assert (trained[name] - before[name]).norm().item() == pytest.approx(
            norm, rel=2e-3, abs=1e-7
        ), name


@pytest.mark.parametrize("depth, rule", RECORDED["freeze_rule"].items())
def test_the_layers_that_freeze_are_the_published(depth, rule, tmp_path):
    with torch.device("meta"):
        model = L2PTransformer(
            replace(L2PConfig(), dim=64, n_heads=2, ffn_dim=64, n_layers=int(depth))
        )
    trained = preparing.prepare(model, config(tmp_path, freeze="5:-5"))
    assert len(trained) == rule["trainable_tensors"]
    frozen = {
        int(name.split(".")[1])
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    assert sorted(frozen) == rule["frozen_main_layers"]


def test_the_full_models_trained_tensors_are_the_published(tmp_path):
    with torch.device("meta"):
        model = L2PTransformer(L2PConfig())
    trained = preparing.prepare(model, config(tmp_path, freeze="5:-5"))
    assert sorted(trained) == sorted(RECORDED["full_model"]["trainable_names"])
    assert (
        sum(parameter.numel() for parameter in trained.values())
        == RECORDED["full_model"]["trainable_parameters"]
    )


@pytest.mark.slow
def test_recomputing_gives_the_same_gradients(golden, tiny_weights, tmp_path):
    recorded, gradients = golden("training_fp32"), []
    for checkpointing in (False, True):
        model = L2PTransformer(L2PConfig.from_shapes(recipe.shapes(recipe.TINY)))
        model.load_state_dict(tiny_weights)
        trained = preparing.prepare(
            model, config(tmp_path, freeze="1:-1", checkpointing=checkpointing)
        )
        image = to_pixels(Image.fromarray(recorded["input.image_u8.64x48"].numpy()))
        flow_matching_loss(
            model,
            image,
            [recorded["input.caption.7"]],
            recorded["input.noise.64x48.seed77"],
            torch.tensor([0.5]),
        ).backward()
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.slow
def test_a_lora_is_what_its_file_says(data):
    """The trained model's output is that of the weights with B @ A of the file added."""
    last = training.train(config(data, lora_rank=4, steps=3, learning_rate=1e-2), progress=False)
    lora, weights = load_file(last), load_model(CHECKPOINT, dtype=torch.float32).state_dict()
    targets = {
        name.removesuffix(".lora_A.weight") for name in lora if name.endswith(".lora_A.weight")
    }
    linears = {
        name.removesuffix(".weight")
        for name, tensor in weights.items()
        if name.startswith("layers.") and tensor.dim() == 2
    }
    assert targets == {f"diffusion_model.{name}" for name in linears}
    settings = config(data, lora_rank=4)
    model = load_model(CHECKPOINT, dtype=torch.float32)
    trained = preparing.prepare(model, settings)
    resuming.load_state(
        data.parent / "run" / "resume.pt",
        trained,
        preparing.make_optimizer(trained, settings),
        settings.batch,
    )
    changed = load_model(CHECKPOINT, dtype=torch.float32)
    for target in targets:
        weight = changed.get_parameter(target.removeprefix("diffusion_model.") + ".weight")
        weight.data = weight + lora[f"{target}.lora_B.weight"] @ lora[f"{target}.lora_A.weight"]
    merge(last, CHECKPOINT, data.parent / "merged.safetensors", dtype="fp32")
    merged = load_model(data.parent / "merged.safetensors", dtype=torch.float32).state_dict()
    for name, weight in changed.state_dict().items():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    inputs = (
        torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0.3]),
        [torch.ones(5, 96)],
    )
    with torch.no_grad():
        wanted, found, before = (
            each(*inputs) for each in (changed, model, load_model(CHECKPOINT, dtype=torch.float32))
        )
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 0.01


def test_noise_levels():
    def levels(sampling, patch=16):
        return training_sigmas(20_000, sampling, 3.0, patch, torch.Generator().manual_seed(0))

    assert set(levels("grid").tolist()) == set(schedule(500)[:-1].tolist())
    assert set(levels("grid", 64).tolist()) == set(schedule(1000)[:-1].tolist())
    assert levels("uniform").mean() == pytest.approx(0.5, abs=0.01) and levels(
        "uniform"
    ).std() == pytest.approx(12**-0.5, abs=0.01)
    logit = levels("logit-normal").logit()
    assert logit.mean() == pytest.approx(0, abs=0.03) and logit.std() == pytest.approx(1, abs=0.03)


# Data

CROPS = json.loads((GOLDEN / "crop_resize.json").read_text())["cases"]


@pytest.mark.parametrize(
    "case",
    [case for case in CROPS if not ("height" in case and "width" in case)],
    ids=lambda case: str(case["input_hw"]),
)
def test_sizes_are_the_published(case):
    assert list(target_size(*case["input_hw"], case["max_pixels"], 16)) == case["output_hw"]


def test_crops_are_the_published():
    recorded = load_file(GOLDEN / "crop_resize.safetensors")
    outputs = [name for name in recorded if name.endswith("output")]
    assert len(outputs) == 4
    for name in outputs:
        image = Image.fromarray(recorded[name.split(".")[0] + ".input"].numpy())
        wanted = recorded[name].numpy()
        assert np.array_equal(np.asarray(crop_and_resize(image, *wanted.shape[:2])), wanted), name


SMALL = [case for case in CROPS if 0 not in case["output_hw"] and max(case["resized_hw"]) < 3000]


@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case['input_hw']}-{case['output_hw']}")
def test_crops_lie_where_the_published_do(case):
    height, width = case["input_hw"]
    ramp = np.stack(
        np.broadcast_arrays(np.arange(width)[None] % 256, np.arange(height)[:, None] % 256, 0), -1
    ).astype(np.uint8)
    top, left = case["crop_top_left"]
    resized = Image.fromarray(ramp).resize(case["resized_hw"][::-1], Image.Resampling.BILINEAR)
    wanted = resized.crop((left, top, left + case["output_hw"][1], top + case["output_hw"][0]))
    assert np.array_equal(
        np.asarray(crop_and_resize(Image.fromarray(ramp), *case["output_hw"])), np.asarray(wanted)
    )


@pytest.mark.parametrize(
    "columns", [("file_name", "text", "seed"), ("image", "prompt", "seed"), ("file_name", "text")]
)
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_of_either_naming_is_read(data, columns, name):
    (data / "metadata.csv").unlink()
    rows = [
        dict(zip(columns, (f"images/{number}.png", f"caption {number}, with a comma", number)))
        for number in range(6)
    ]
    with (data / name).open("w", newline="") as stream:
        if name.endswith("csv"):
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
        else:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    examples = read_examples(data, None, 96 * 96, 16)
    assert [example.captions for example in examples] == [
        (f"caption {number}, with a comma",) for number in range(6)
    ]
    assert [example.seed for example in examples] == (
        list(range(6)) if "seed" in columns else [None] * 6
    )
    assert {example.size for example in examples} == {(96, 96), (64, 128)}


def test_faults_are_named_before_training(data):
    (data / "images" / "broken.png").write_bytes((data / "images" / "0.png").read_bytes()[:200])
    (data / "images" / "notes.png").write_text("not an image")
    Image.new("RGB", (8, 200)).save(data / "images" / "thin.png")
    with (data / "metadata.csv").open("a") as stream:
        stream.write(
            "broken.png,a,1\nnotes.png,b,2\nthin.png,c,3\nabsent.png,d,4\n0.png,again,5\n1.png,,6\n2.png,e,minus\n3.png,f,\n"
        )
    with pytest.raises(ValueError) as error:
        training.train(config(data), progress=False)
    told = str(error.value)
    for words in (
        "notes.png",
        "thin.png: 8 x 200",
        "absent.png: no such file",
        "0.png is named 2 times",
        "1.png: no caption",
        "2.png: seed is 'minus'",
        "3.png: no seed, but",
    ):
        assert words in told
    rows = (data / "metadata.csv").read_text().splitlines()[:8]
    (data / "metadata.csv").write_text("\n".join(rows))  # files are read once the rows are right
    with pytest.raises(ValueError, match="row 7: broken.png"):
        training.train(config(data), progress=False)
    assert not (data.parent / "run").exists()


def test_batches_hold_one_size_and_every_example_once_an_epoch(data):
    examples = read_examples(data, None, 96 * 96, 16)
    batches = Batches(
        examples, {example.captions[0]: torch.zeros(1, 1) for example in examples}, config(data), 16
    )
    assert batches.per_epoch == 3
    shapes = [batches[number].images.shape[-2:] for number in range(6)]
    assert sorted(shapes) == sorted([(96, 96), (96, 96), (64, 128)] * 2)
    for epoch in range(4):
        assert sorted(index for batch in batches._epoch(epoch) for index in batch) == list(range(6))
    assert batches._epoch(0) != batches._epoch(3)


@pytest.mark.parametrize("batch, processes, rows", [(1, 1, 8), (1, 4, 2), (2, 2, 2), (4, 1, 2)])
def test_images_of_rare_sizes_share_a_step(batch, processes, rows):
    """Five of one size and three of another: none is taken twice to fill a row."""
    examples = [
        Example(Path(str(number)), ("",), None, (64, 64) if number < 5 else (64, 80))
        for number in range(8)
    ]
    planned = plan_epoch(examples, batch, processes, seed=0, epoch=0)
    assert len(planned) == rows and sorted(sum(planned, [])) == list(range(8))


def test_a_coarser_grid_makes_fewer_sizes(data):
    for number in range(6):
        Image.new("RGB", (96 + 3 * number, 96)).resize((96 + 16 * (number % 3), 96)).save(
            data / "images" / f"{number}.png"
        )
    assert {example.size for example in read_examples(data, None, 128 * 128, 16)} == {
        (96, 96),
        (96, 112),
        (96, 128),
    }
    assert {example.size for example in read_examples(data, None, 128 * 128, 32)} == {
        (96, 96),
        (96, 128),
    }
    with pytest.raises(ValueError, match="size_step is 24.*multiples of 16"):
        training.train(config(data, size_step=24), progress=False)


def test_paired_noise_is_that_of_the_examples_seed(data):
    examples = read_examples(data, (96, 96), 0, 16)
    captions = {example.captions[0]: torch.zeros(1, 1) for example in examples}
    seeds = [
        examples[index].seed for index in Batches(examples, captions, config(data), 16)._epoch(0)[0]
    ]
    assert torch.equal(
        Batches(examples, captions, config(data), 16)[0].noise, draw_noise((2, 3, 96, 96), seeds)
    )
    loose = Batches(examples, captions, config(data, noise="random"), 16)
    assert not torch.equal(loose[0].noise, draw_noise((2, 3, 96, 96), seeds))
    assert torch.equal(loose[0].noise, loose[0].noise) and not torch.equal(
        loose[0].noise, loose[1].noise
    )


def test_processes_share_a_batch(data):
    examples = read_examples(data, (96, 96), 0, 16)
    texts = ["", *(example.captions[0] for example in examples)]
    captions = {caption: torch.full((1, 1), float(number)) for number, caption in enumerate(texts)}
    settings = config(data, noise="random", caption_dropout=0.5, batch=1)
    one = Batches(examples, captions, replace(settings, batch=2), 16)
    two = [Batches(examples, captions, settings, 16, processes=2, rank=rank) for rank in range(2)]
    dropped = 0
    for number in range(8):
        for name in ("images", "noise", "sigma"):
            assert torch.equal(
                torch.cat([getattr(each[number], name) for each in two]), getattr(one[number], name)
            ), name
        assert [*two[0][number].captions, *two[1][number].captions] == one[number].captions
        dropped += sum(caption.item() == 0 for caption in one[number].captions)
    assert 2 < dropped < 14


@pytest.mark.slow
def test_one_of_an_images_captions_is_drawn_each_time(data):
    names = [["most", "most", "most", "some"], *(f"caption {number}" for number in range(1, 4))]
    (data / "metadata.csv").unlink()
    (data / "metadata.json").write_text(
        json.dumps(
            [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(names)]
        )
    )
    examples = read_examples(data, None, 96 * 96, 16)
    assert examples[0].captions == ("most", "most", "most", "some")
    batches = Batches(
        examples, {name: name for name in ("most", "some", *names[1:])}, config(data), 16
    )
    drawn = Counter(caption for number in range(400) for caption in batches[number].captions)
    assert drawn["most"] + drawn["some"] == drawn["caption 1"] == 200
    assert 25 < drawn["some"] < 75


@pytest.mark.slow
def test_captions_are_encoded_once(data, monkeypatch):
    training.train(config(data, steps=1), progress=False)
    pipe = L2PPipeline.from_pretrained(None, torch_dtype=torch.float32)
    caption = scenes()[0].caption()
    encodings = training.Encodings(data / "encodings", pipe)
    assert torch.equal(encodings[caption], pipe.encode_prompt(caption))
    monkeypatch.setattr(TextEncoder, "load", None)
    training.train(config(data, steps=2), progress=False)
    other = training.Encodings(
        data / "encodings", L2PPipeline.from_pretrained(None, torch_dtype=torch.bfloat16)
    )
    assert other.file(caption) != encodings.file(caption), (
        "what another dtype gives is another encoding"
    )
    shutil.copytree(BUNDLED_MODEL / "tokenizer", data / "tokenizer")
    with (data / "tokenizer" / "tokenizer_config.json").open("a") as stream:
        stream.write(" ")
    other = training.Encodings(
        data / "encodings",
        L2PPipeline.from_pretrained(None, tokenizer=data / "tokenizer", torch_dtype=torch.float32),
    )
    assert other.file(caption) != encodings.file(caption), "and another tokenizer"


# The run


class Page(HTMLParser):
    """A page's tags, texts and images, as a browser finds them."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts, self.images = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        address = dict(attrs).get("src", dict(attrs).get("href"))
        if address:
            assert address.startswith("data:image/png;base64,"), address[:80]
            content = base64.b64decode(address.partition(",")[2])
            self.images.append(Image.open(io.BytesIO(content)).convert("RGB"))

    def handle_data(self, text):
        self.texts.add(text)


@pytest.mark.slow
def test_a_run_leaves_what_it_should_and_merges(data):
    settings = config(
        data,
        sample_every=3,
        sample_steps=2,
        sample_prompts=("a red circle", "a <script> star"),
        keep=1,
        held_out=1,
    )
    last = training.train(settings, progress=False)
    run = data.parent / "run"
    assert sorted(file.name for file in run.iterdir() if file.name != "tensorboard") == [
        "config.toml",
        "held_out.csv",
        "log.csv",
        "loss.png",
        "report.html",
        "resume.pt",
        "samples",
        "samples.png",
        "step-6.safetensors",
    ]
    assert Image.open(run / "samples.png").size == (
        192,
        3 * 96,
    ), "before, after 3 and after 6 steps"
    assert read_config(run / "config.toml", {}) == settings
    page = Page()
    page.feed((run / "report.html").read_text(encoding="utf-8"))
    assert not page.tags & {"script", "link", "iframe"}, "it loads and runs nothing"
    curve, sheet, newest = page.images
    for found, file in (
        (curve, run / "loss.png"),
        (sheet, run / "samples.png"),
        (newest, run / "samples" / "step-0000006.png"),
    ):
        assert np.array_equal(found, Image.open(file).convert("RGB")), file.name
    assert {"a <script> star", "sample_steps", "6 of 6", "6 images, 5 an epoch with repeats and"
            " regularization"} <= page.texts  # fmt: skip
    part, before = load_file(last), load_file(CHECKPOINT)
    assert not any(name.startswith("layers.1.") for name in part) and any(
        name.startswith("layers.0.") for name in part
    )
    merged = data.parent / "merged.safetensors"
    merge(last, CHECKPOINT, merged)
    after = load_model(merged, dtype=torch.float32).state_dict()
    assert any(not torch.equal(part[name].float(), before[name].float()) for name in part)
    for name, tensor in after.items():
        assert torch.equal(tensor, part.get(name, before[name]).float()), name


@pytest.mark.slow
def test_training_learns_its_images(data):
    for number in range(6):  # nothing the model has seen
        levels = np.sin(np.arange(96) / (2 + number))[:, None, None] * [100, 60, 20] + 128
        Image.fromarray(np.broadcast_to(levels, (96, 96, 3)).astype(np.uint8)).save(
            data / "images" / f"{number}.png"
        )
    training.train(
        config(data, steps=60, save_every=60, learning_rate=2e-3, batch=4, height=96, width=96),
        progress=False,
    )
    found = [loss for _, loss in losses(data.parent / "run")]
    assert sum(found[-12:]) < 0.7 * sum(found[:12])


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(data, monkeypatch):
    whole = training.train(
        config(data, output=str(data.parent / "whole"), caption_dropout=0.3, accumulate=2),
        progress=False,
    )
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 10:  # in the middle of step 5
            raise Killed
        return LOSS(*args)

    monkeypatch.setattr(training.Run, "loss", dies)
    halves = config(data, caption_dropout=0.3, accumulate=2)
    with pytest.raises(Killed):
        training.train(halves, progress=False)
    monkeypatch.setattr(training.Run, "loss", LOSS)
    again = training.train(halves, progress=False)
    assert (
        losses(data.parent / "run") == losses(data.parent / "whole")
        and len(losses(data.parent / "run")) == 6
    )
    wanted, found = load_file(whole), load_file(again)
    assert (
        all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
        and found.keys() == wanted.keys()
    )


def told(run):
    """The loss of what is held out, by step."""
    with (run / "held_out.csv").open() as stream:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(stream)}


@pytest.mark.slow
def test_what_is_held_out_is_never_trained_on_and_its_loss_is_that_of_the_step_file(
    data, monkeypatch
):
    seen = []

    def watched(run, batch):
        seen.append((torch.is_grad_enabled(), batch.images))
        return LOSS(run, batch)

    monkeypatch.setattr(training.Run, "loss", watched)
    settings = config(
        data,
        held_out=2,
        sample_every=2,
        sample_steps=1,
        sample_prompts=("a star",),
        height=96,
        width=96,
        batch=1,
        ema=0.5,
    )
    training.train(replace(settings, steps=4, save_every=4), progress=False)
    learned, looked = (
        {image.numpy().tobytes() for grad, image in seen if grad == which}
        for which in (True, False)
    )
    assert len(learned) == 4 and len(looked) == 2 and not learned & looked
    training.train(settings, progress=False)
    run = data.parent / "run"
    found = told(run)
    assert list(found) == [0, 2, 4, 6]
    merge(run / "step-6.safetensors", CHECKPOINT, data.parent / "merged.safetensors", dtype="fp32")
    pipe, examples = (
        L2PPipeline.from_pretrained(torch_dtype=torch.float32),
        read_examples(data, (96, 96), 0, 16),
    )
    for step, file in ((0, CHECKPOINT), (6, data.parent / "merged.safetensors")):
        model, losses_by_hand = load_model(file, dtype=torch.float32), []
        for number in range(2):
            batch = Batches(
                hold_out(examples, 2, 0)[1],
                training.Encodings(data / "encodings", pipe),
                settings,
                16,
            )[number]
            (example,) = (
                each
                for each in examples
                if torch.equal(
                    to_pixels(crop_and_resize(Image.open(each.file), 96, 96)), batch.images
                )
            )
            noise = draw_noise((1, 3, 96, 96), [example.seed])
            x = (1 - batch.sigma) * batch.images + batch.sigma * noise
            with torch.no_grad():
                velocity = model(x, 1 - batch.sigma, [pipe.encode_prompt(example.captions[0])])
            losses_by_hand.append((velocity + noise - batch.images).square().mean())
        assert found[step] == pytest.approx(torch.stack(losses_by_hand).mean().item(), rel=1e-4)
    assert found[6] != found[0]


@pytest.mark.slow
def test_step_files_hold_the_mean_that_was_asked_for(data):
    """Against the weights of every step of the same run without it."""
    plain = training.train(config(data, save_every=1, keep=0), progress=False).parent
    mean = load_model(CHECKPOINT, dtype=torch.float32).state_dict()
    for step in range(1, 7):
        for name, tensor in load_file(plain / f"step-{step}.safetensors").items():
            mean[name] += (1 - min(0.3, step / (9 + step))) * (tensor - mean[name])
    halves = config(data, ema=0.3, output=str(data.parent / "mean"), steps=4, save_every=4)
    training.train(halves, progress=False)
    found = load_file(training.train(replace(halves, steps=6), progress=False))
    assert losses(data.parent / "mean") == losses(plain), "training itself is the same"
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, mean[name], atol=1e-6, rtol=1e-5, msg=name)


class Doubled(training.Run):
    def loss(self, batch):
        return 2 * super().loss(batch)


@pytest.mark.slow
def test_samples_that_a_stop_left_out_are_drawn_when_it_goes_on(data):
    def go_on(steps):
        training.train(
            config(data, steps=steps, sample_every=2, sample_steps=1, sample_prompts=("a star",)),
            progress=False,
        )

    go_on(2)
    samples = data.parent / "run" / "samples"
    started = (samples / "step-0000000.png").stat().st_mtime_ns
    (samples / "step-0000002.png").unlink()
    go_on(4)
    assert (
        len(list(samples.iterdir())) == 3
        and (samples / "step-0000000.png").stat().st_mtime_ns == started
    )
    drawn = (samples / "step-0000004.png").stat().st_mtime_ns
    go_on(6)
    assert (samples / "step-0000004.png").stat().st_mtime_ns == drawn, (
        "what is there is not drawn again"
    )


@pytest.mark.slow
def test_a_recipe_replaces_parts_of_the_run(data):
    plain = training.train(config(data, steps=1), progress=False).parent
    training.train(
        config(data, steps=1, recipe=f"{__name__}:Doubled", output=str(data.parent / "doubled")),
        progress=False,
    )
    (_, once), (_, twice) = *losses(plain), *losses(data.parent / "doubled")
    assert twice == pytest.approx(2 * once)


@pytest.mark.parametrize(
    "name", ["nothing", "absent.module:Run", "math:Run", "math:pi", "pathlib:Path"]
)
def test_a_recipe_that_is_none_is_rejected(data, name):
    with pytest.raises(ValueError, match=f"recipe is '{name}'"):
        training.train(config(data, recipe=name), progress=False)


@pytest.mark.slow
def test_an_interrupt_saves_the_step_it_is_in(data, monkeypatch):
    def interrupted(*args):
        if not calls:
            os.kill(os.getpid(), signal.SIGINT)
        calls.append(1)
        return LOSS(*args)

    calls = []
    monkeypatch.setattr(training.Run, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train(config(data), progress=False)
    assert torch.load(data.parent / "run" / "resume.pt")["step"] == 1
    training.train(config(data), progress=False)
    assert [step for step, _ in losses(data.parent / "run")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "factor, words", [(float("nan"), "the loss is nan"), (1e4, "the loss diverges")]
)
def test_a_run_that_goes_wrong_stops_at_the_last_good_state(data, monkeypatch, factor, words):
    monkeypatch.setattr(record, "WINDOW", 2)
    calls = []

    def goes_wrong(*args):
        calls.append(1)
        return LOSS(*args) * (factor if len(calls) > 4 else 1)

    monkeypatch.setattr(training.Run, "loss", goes_wrong)
    with pytest.raises(ValueError, match=f"{words}.*at step 5.*last good state is step 3"):
        training.train(config(data), progress=False)
    assert sorted(file.name for file in (data.parent / "run").glob("step-*")) == [
        "step-3.safetensors"
    ]
    assert torch.load(data.parent / "run" / "resume.pt")["step"] == 3


@pytest.mark.slow
def test_nothing_is_saved_where_the_loss_has_begun_to_climb(data, monkeypatch):
    monkeypatch.setattr(record, "RECENT", 1)
    calls = []

    def climbs(*args):
        calls.append(1)
        return LOSS(*args) * (800 if len(calls) == 3 else 1)

    monkeypatch.setattr(training.Run, "loss", climbs)
    training.train(config(data), progress=False)
    assert sorted(file.name for file in (data.parent / "run").glob("step-*")) == [
        "step-4.safetensors",
        "step-6.safetensors",
    ]


@pytest.mark.parametrize(
    "losses, stops_at",
    [
        ([1] + [50] * 120, 100),
        ([1] + [50] * 9 + [1] * 120, None),
        ([30] * 150, None),
        ([0.3] * 150 + [3] * 100, 150 + 23),
    ],
)
def test_a_loss_that_diverges_is_told_from_one_that_is_large(tmp_path, losses, stops_at):
    """The last: its mean over 100 steps passes 0.9 with the 23rd of 3."""
    log = record.Log(tmp_path, 0, True)
    for step, loss in enumerate(losses, 1):
        log.add(record.Row(step, loss, 0, 0, 0))
        if log.trouble():
            break
    assert (step if log.trouble() else None) == stops_at


@pytest.mark.slow
def test_a_run_that_learned_nothing_yet_takes_other_settings(data, monkeypatch):
    monkeypatch.setattr(training.Run, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        training.train(config(data), progress=False)
    monkeypatch.undo()
    training.train(config(data, optimizer="adamw8bit"), progress=False)


@pytest.mark.slow
def test_a_run_with_other_settings_is_not_gone_on_with(data):
    training.train(config(data, steps=1), progress=False)
    with pytest.raises(ValueError, match="weight_decay 0.01, now 0.1"):
        training.train(config(data, weight_decay=0.1), progress=False)
    with pytest.raises(ValueError, match="takes 2 images at once, now 4"):
        training.train(config(data, batch=4), progress=False)
    training.train(config(data, steps=2, learning_rate=1e-4), progress=False)
    with (data.parent / "run" / "log.csv").open() as stream:
        assert [float(row["learning_rate"]) for row in csv.DictReader(stream)] == pytest.approx(
            [1e-3 / 3, 1e-4 / 3]
        )


@pytest.mark.slow
def test_what_another_run_left_is_not_taken_away(data):
    run = data.parent / "run"
    run.mkdir()
    (run / "step-9000.safetensors").write_text("of before")
    training.train(config(data, keep=1), progress=False)
    assert {file.name for file in run.glob("step-*")} == {
        "step-6.safetensors",
        "step-9000.safetensors",
    }


@pytest.mark.slow
def test_half_a_line_of_the_log_is_forgotten(data):
    training.train(config(data, steps=3), progress=False)
    with (data.parent / "run" / "log.csv").open("a") as stream:
        stream.write("4,0.1")
    training.train(config(data, steps=6), progress=False)
    assert [step for step, _ in losses(data.parent / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_launchers_stop_after_the_keyboards_does_not_abort_the_save():
    with noted() as asked:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file, words", [("resume.pt", "can't be read"), ("config.toml", "is no TOML")]
)
def test_a_damaged_run_is_rejected_in_words(data, file, words):
    training.train(config(data, steps=1), progress=False)
    (data.parent / "run" / file).write_bytes(b"\x80 damaged")
    with pytest.raises(ValueError, match=words):
        training.train(config(data, steps=2), progress=False)


def in_two_processes(settings):
    """Train in two processes on the CPU, which meet at a port of their own."""
    toml = Path(settings.output).with_suffix(".toml")
    toml.write_text(to_toml(settings))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "comfyui_l2p.l2p_core.cli",
        "train",
        str(toml),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "1",
            "PYTHONFAULTHANDLER": "1",
        },
    )
    assert done.returncode == 0, done.stderr[
        -12000:
    ]  # the launcher's own words come last, and are long


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_doubled_batch(data):
    samples = {
        "sample_every": 3,
        "sample_steps": 1,
        "sample_prompts": ("a star", "a circle", "a square"),
    }
    training.train(config(data, steps=3, batch=4, **samples), progress=False)
    in_two_processes(config(data, steps=3, output=str(data.parent / "two"), **samples))
    one, two = (losses(data.parent / name) for name in ("run", "two"))
    assert [step for step, _ in two] == [1, 2, 3]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    pixels = [
        np.asarray(Image.open(data.parent / name / "samples.png"), np.int16)
        for name in ("run", "two")
    ]
    assert abs(pixels[1] - pixels[0]).max() <= 2  # each process generates some of them


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["state", "all"])
def test_a_split_model_trains_saves_and_goes_on_as_a_whole_one(data, kind):
    """Two processes that hold half of everything, stopped after two steps, against one that was
    not."""
    common = {
        "accumulate": 2,
        "max_grad_norm": 0.5,
        "ema": 0.5,
        "save_every": 2,
        "sample_every": 1,
        "sample_steps": 1,
        "held_out": 2,
        "sample_prompts": ("a star",),
        "height": 96,
        "width": 96,
    }
    whole = training.train(config(data, batch=4, steps=4, **common), progress=False)
    split = config(data, output=str(data.parent / "split"), shard=kind, **common)
    in_two_processes(replace(split, steps=2))
    in_two_processes(replace(split, steps=4))
    one, two = (losses(data.parent / name) for name in ("run", "split"))
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4) and len(
        two
    ) == 4
    assert (
        told(data.parent / "split") == pytest.approx(told(data.parent / "run"), rel=1e-4)
        and len(told(data.parent / "run")) == 5
    )
    wanted, found, before = (
        load_file(whole),
        load_file(data.parent / "split" / "step-4.safetensors"),
        load_file(CHECKPOINT),
    )
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        if (
            name.endswith(".weight") and tensor.dim() > 1
        ):  # of a bias whose gradient is nothing, AdamW's step is of any size
            assert rms(found[name] - tensor, tensor - before[name].float()) < 0.02, name
    assert Image.open(data.parent / "split" / "samples.png").size == (96, 5 * 96)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"shard": "all"}, "there is one process"),
        ({"shard": "all", "lora_rank": 4}, "lora_rank is 4"),
        ({"shard": "state", "optimizer": "adamw8bit"}, "optimizer is 'adamw8bit'"),
        ({"shard": "half"}, "expected one of"),
    ],
)
def test_what_cannot_be_split_is_rejected(data, changes, words):
    with pytest.raises(ValueError, match=words):
        training.train(config(data, **changes), progress=False)


# Settings


def test_settings_come_from_the_file_and_flags_say_otherwise(data, capsys):
    toml = data.parent / "run.toml"
    toml.write_text(to_toml(config(data, steps=5)))
    assert (
        main(
            [
                "train",
                str(toml),
                "--steps",
                "1",
                "--sample-prompts",
                "a red circle",
                "a star",
                "--no-checkpointing",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.strip().endswith("step-1.safetensors")
    read = read_config(data.parent / "run" / "config.toml", {})
    assert (read.steps, read.sample_prompts, read.checkpointing, read.batch) == (
        1,
        ("a red circle", "a star"),
        False,
        2,
    )


@pytest.mark.parametrize(
    "text, words",
    [
        ("stepz = 5", "did you mean steps?"),
        ("steps = 'five'", "expected a whole number"),
        ("steps = 0", "expected more than 0"),
        ("steps = true", "expected a whole number"),
        ("noise = 'loud'", "expected one of auto, paired, random"),
        ("steps = ", "is no TOML"),
        ("freeze = 'all'", "expected a slice"),
        ("height = 96", "give both, or neither"),
        ("learning_rate = nan", "expected 0 or more"),
        ("caption_dropout = 2", "a share from 0 to 1"),
        ("warmup = 5", "schedule published has its own"),
        ("held_out = 3\nsample_every = 0", "give both, or neither"),
        ("quantize_frozen = 'int8'\nfreeze = ''", "leaves nothing frozen"),
        ("device = 'cuda:1'", "expected one of"),
        ("sample_prompts = 'one'", "expected a list of texts"),
        ("", "checkpoint is not given"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, capsys, text, words):
    (tmp_path / "run.toml").write_text(text)
    flags = ["--checkpoint", "c", "--data", "d", "--output", str(tmp_path / "run")] if text else []
    assert main(["train", str(tmp_path / "run.toml"), *flags]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_paired_noise_needs_seeds(tmp_path):
    data = make_data(tmp_path / "data", seeds=False)
    with pytest.raises(ValueError, match="have no seeds"):
        training.train(config(data, noise="paired"), progress=False)
    training.train(config(data, steps=1), progress=False)


# What a run keeps when something goes wrong


def state_of(run):
    return torch.load(run / "resume.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(5, "Input/output error"),
        ValueError("NaN"),
        RuntimeError(),
    ],
)
@pytest.mark.parametrize("task", ["sample", "validate"])
def test_a_failed_sample_is_a_warning(data, monkeypatch, error, task):
    def fails(self):
        raise error

    monkeypatch.setattr(training.Run, task, fails)
    settings = config(
        data,
        steps=4,
        save_every=2,
        sample_every=2,
        sample_steps=1,
        sample_prompts=("a star",),
        held_out=1,
        batch=1,
    )
    with pytest.warns(
        UserWarning,
        match=r"(samples|the validation loss) at step [024] failed \(.+\); training continues",
    ):
        last = training.train(settings, progress=False)
    assert last.exists() and [step for step, _ in losses(data.parent / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_state_is_saved_before_samples_are_generated(data, monkeypatch):
    """Also where only samples are due, and without a step file then."""
    seen = []

    def sample(self):
        if self.step:
            seen.append(
                (
                    self.step,
                    state_of(self.output)["step"],
                    sorted(file.name for file in self.output.glob("step-*")),
                )
            )

    monkeypatch.setattr(training.Run, "sample", sample)
    training.train(config(data, sample_every=2, save_every=3), progress=False)
    assert seen == [
        (2, 2, []),
        (4, 4, ["step-3.safetensors"]),
        (6, 6, ["step-3.safetensors", "step-6.safetensors"]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error",
    [
        OSError(116, "Stale file handle"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ValueError("no image"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("place", ["batch", "loss"])
def test_an_error_in_a_step_saves_the_steps_before_it_and_resumes_bit_for_bit(
    data, monkeypatch, error, place
):
    real, calls = getattr(training.Run, place), []

    def fails(self, *args):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return real(self, *args)

    settings = config(data, save_every=100, ema=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, place, fails)
        with (
            pytest.raises(type(error)),
            pytest.warns(UserWarning, match="the state of step 4 is saved"),
        ):
            training.train(settings, progress=False)
    assert state_of(data.parent / "run")["step"] == 4
    found = training.train(settings, progress=False)
    wanted = training.train(replace(settings, output=str(data.parent / "whole")), progress=False)
    one, other = load_file(found), load_file(wanted)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items()) and losses(
        found.parent
    ) == losses(wanted.parent)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ema": 0.5},
        {"step_in_backward": True, "stochastic_rounding": True, "mixed_precision": "bf16"},
    ],
)
def test_weights_of_half_a_step_are_not_saved(data, monkeypatch, changes):
    """An error in the optimizer, in the mean of the weights, or in a backward pass that updates as
    it goes."""
    calls = []

    def counts(real):
        def fails(self, *args, **kwargs):
            result = real(self, *args, **kwargs)
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("half a step")
            return result

        return fails

    if "ema" in changes:
        monkeypatch.setattr(torch.Tensor, "lerp_", counts(torch.Tensor.lerp_))
    elif changes:
        monkeypatch.setattr(PerTensorOptimizer, "update", counts(PerTensorOptimizer.update))
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", counts(torch.optim.AdamW.step))
    with pytest.raises(RuntimeError, match="half a step"):
        training.train(config(data, save_every=100, **changes), progress=False)
    assert not (data.parent / "run" / "resume.pt").exists()


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_and_keeps_the_last_state(data, monkeypatch, capsys):
    training.train(config(data, steps=2, save_every=2), progress=False)
    before = (data.parent / "run" / "resume.pt").read_bytes()
    real = torch.save

    def full(state, stream):
        stream.raw.failed = OSError(28, "No space left on device")
        raise RuntimeError(
            "[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file"
            " data/0"
        )

    monkeypatch.setattr(torch, "save", full)
    toml = data.parent / "run.toml"
    toml.write_text(to_toml(config(data, steps=4)))
    assert main(["train", str(toml)]) == 1
    assert "run is full, so resume.pt was not written" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(torch, "save", real)
    assert (data.parent / "run" / "resume.pt").read_bytes() == before
    assert not list((data.parent / "run").glob(".*"))


SPOILED = {
    "empty": lambda file: file.write_bytes(b""),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "text": lambda file: file.write_text("hello"),
    "a list": lambda file: torch.save([1], file),
    "no keys": lambda file: torch.save({}, file),
    "steps in words": lambda file: torch.save({**torch.load(file), "step": "two"}, file),
    "other shapes": lambda file: torch.save(
        {
            **torch.load(file),
            "tensors": {name: torch.zeros(1) for name in torch.load(file)["tensors"]},
        },
        file,
    ),
    "no tensors": lambda file: torch.save(
        {**torch.load(file), "tensors": dict.fromkeys(torch.load(file)["tensors"], 3)}, file
    ),
    "another optimizer": lambda file: torch.save(
        {**torch.load(file), "optimizer": {"state": {}, "param_groups": [1, 2]}}, file
    ),
    "no optimizer": lambda file: torch.save({**torch.load(file), "optimizer": {}}, file),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_state_is_one_sentence(data, capsys, how):
    training.train(config(data, steps=1), progress=False)
    SPOILED[how](data.parent / "run" / "resume.pt")
    toml = data.parent / "run.toml"
    toml.write_text(to_toml(config(data, steps=2)))
    assert main(["train", str(toml)]) == 1
    said = capsys.readouterr().err
    assert (
        "resume.pt" in said.splitlines()[-1]
        and ("can't be read" in said or "is no file" in said)
        and "Traceback" not in said
    )


# Resuming compares contents


@pytest.mark.slow
def test_a_run_resumes_where_data_and_checkpoint_were_moved_to(data, monkeypatch):
    settings = config(
        data, held_out=2, sample_every=2, sample_steps=1, batch=1, sample_prompts=("a star",)
    )
    training.train(replace(settings, steps=2, save_every=2), progress=False)
    elsewhere = data.parent / "elsewhere"
    shutil.move(data, elsewhere)
    shutil.copy(CHECKPOINT, data.parent / "model.safetensors")
    monkeypatch.chdir(data.parent)
    moved = replace(
        settings,
        data="elsewhere",
        checkpoint="model.safetensors",
        text_encoder=str(BUNDLED_MODEL / "text_encoder"),
        output="run",
        steps=4,
    )
    split = []
    monkeypatch.setattr(
        training, "hold_out", lambda *args: split.append(hold_out(*args)) or split[-1]
    )
    training.train(moved, progress=False)
    assert [step for step, _ in losses(data.parent / "run")] == [1, 2, 3, 4]
    before = hold_out(read_examples(elsewhere, None, 96 * 96, 16), 2, 0)[1]
    assert [example.name for example in split[0][1]] == [example.name for example in before]


def change_image(data):
    Image.new("RGB", (96, 96), "blue").save(data / "images" / "0.png")


def change_text(data, old, new):
    file = data / "metadata.csv"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def add_image(data):
    Image.new("RGB", (96, 96), "blue").save(data / "images" / "9.png")
    with (data / "metadata.csv").open("a") as stream:
        stream.write("9.png,a star,1009\n")


def swap_rows(data):
    first, *rows = (data / "metadata.csv").read_text().splitlines()
    (data / "metadata.csv").write_text("\n".join([first, *rows[::-1]]) + "\n")


CHANGES = {
    "an image": (change_image, "6 images then and 6 now; 1 are new .*first: 0.png.*1 are gone"),
    "a caption": (
        lambda data: change_text(data, "small", "tiny"),
        "1 are new or have another image, caption or seed",
    ),
    "a seed": (
        lambda data: change_text(data, "1000", "2000"),
        "1 are new or have another image, caption or seed",
    ),
    "one more": (add_image, "6 images then and 7 now.*first: 9.png.*0 are gone"),
    "the order": (swap_rows, "in another order"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_changed_data_is_reported_and_nothing_is_trained_on_it(data, what):
    training.train(config(data, steps=2, save_every=2), progress=False)
    change, said = CHANGES[what]
    change(data)
    with pytest.raises(ValueError, match=f"run holds a run on other data: .*{said}"):
        training.train(config(data, steps=4), progress=False)
    assert [step for step, _ in losses(data.parent / "run")] == [1, 2] and state_of(
        data.parent / "run"
    )["step"] == 2


@pytest.mark.slow
def test_renamed_images_are_the_same_data(data):
    training.train(config(data, steps=2, save_every=2), progress=False)
    (data / "images" / "0.png").rename(data / "images" / "zero.png")
    change_text(data, "0.png", "zero.png")
    training.train(config(data, steps=3), progress=False)
    assert [step for step, _ in losses(data.parent / "run")] == [1, 2, 3]


@pytest.mark.slow
def test_another_checkpoint_or_text_encoder_is_reported(data, write):
    training.train(config(data, steps=1), progress=False)
    tensors = load_file(CHECKPOINT)
    other = write({**tensors, "x_pad_token": tensors["x_pad_token"] + 1}, "model.safetensors")
    encoder = str(BUNDLED_MODEL / "text_encoder")
    with pytest.raises(
        ValueError, match="run holds a run with another checkpoint: its contents have changed"
    ):
        training.train(
            config(data, steps=2, checkpoint=str(other), text_encoder=encoder), progress=False
        )
    shutil.copytree(BUNDLED_MODEL / "tokenizer", data / "tokenizer")
    with (data / "tokenizer" / "tokenizer_config.json").open("a") as stream:
        stream.write(" ")
    with pytest.raises(ValueError, match="run holds a run with another tokenizer"):
        training.train(config(data, steps=2, tokenizer=str(data / "tokenizer")), progress=False)


@pytest.mark.slow
def test_a_state_of_before_there_were_hashes_resumes_with_a_note(data):
    training.train(config(data, steps=1), progress=False)
    file = data.parent / "run" / "resume.pt"
    torch.save({name: value for name, value in torch.load(file).items() if name != "inputs"}, file)
    with pytest.warns(UserWarning, match="saved by an earlier version"):
        training.train(config(data, steps=2), progress=False)
    assert state_of(data.parent / "run")["inputs"]["images"]


# Two runs at once


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_rejected_while_the_first_trains(data, monkeypatch):
    monkeypatch.setattr(training, "WAIT", 0)

    def loss(*args):
        with pytest.raises(
            AlreadyRunning,
            match="another run is training in .*run. Wait for it to finish, or give another output",
        ):
            training.train(config(data), progress=False)
        return LOSS(*args)

    monkeypatch.setattr(training.Run, "loss", loss)
    training.train(config(data, steps=2), progress=False)
    assert [step for step, _ in losses(data.parent / "run")] == [1, 2]


@pytest.mark.slow
def test_two_identical_commands_train_one_run(data):
    toml = data.parent / "run.toml"
    toml.write_text(to_toml(config(data, save_every=1)))
    command = [sys.executable, "-m", "comfyui_l2p.l2p_core.cli", "train", str(toml)]
    both = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [step for step, _ in losses(data.parent / "run")] == [1, 2, 3, 4, 5, 6]
    assert "another run is training in" in "".join(said) and not list(
        (data.parent / "run").glob(".*")
    )


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(96),
        torch.zeros(5, 97),
        torch.zeros(0, 96),
        torch.zeros(513, 96),
        torch.zeros(1, 5, 96),
        None,
    ],
)
def test_prompt_embeddings_of_another_shape_are_rejected(data, features):
    """The folder may come with the images, from anyone."""
    encodings = training.Encodings(
        data / "encodings", L2PPipeline.from_pretrained(None, torch_dtype=torch.float32)
    )
    encodings.add(["a star"])
    assert encodings["a star"].shape[1] == 96
    save_file(
        {"other": torch.zeros(1)} if features is None else {"features": features},
        encodings.file("a star"),
    )
    with pytest.raises(CheckpointError, match="can't be read .*Delete it"):
        encodings["a star"]


def test_what_a_killed_run_left_of_its_prompt_embeddings_is_removed(data):
    (data / "encodings").mkdir()
    (data / "encodings" / ".0123.l2p-part").write_bytes(b"half")
    training.train(config(data, steps=1), progress=False)
    assert (
        not list((data / "encodings").glob(".*")) and len(list((data / "encodings").iterdir())) == 7
    )
    modes = {
        file.stat().st_mode & 0o777
        for folder in (data / "encodings", data.parent / "run")
        for file in folder.iterdir()
        if file.is_file()
    }
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs links and FIFOs")
@pytest.mark.parametrize(
    "name",
    [
        "log.csv",
        "config.toml",
        "resume.pt",
        "loss.png",
        "samples.png",
        "step-1.safetensors",
        ".resume.pt.part",
    ],
)
def test_links_and_fifos_in_a_runs_folder_do_no_harm(data, name):
    secret, run = data.parent / "secret", data.parent / "run"
    for kind in ("link", "FIFO"):
        run.mkdir()
        secret.write_text("step,loss\n")
        if kind == "link":
            (run / name).symlink_to(secret)
        else:
            os.mkfifo(run / name)
        settings = config(data, steps=1, sample_every=1, sample_steps=1, sample_prompts=("a star",))
        if name == "resume.pt" or (kind, name) == ("FIFO", "config.toml"):
            with pytest.raises(ValueError, match="holds something else than a run"):
                training.train(settings, progress=False)
        else:
            training.train(settings, progress=False)
            assert [step for step, _ in losses(run)] == [1]
        assert secret.read_text() == "step,loss\n"
        shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    ["", "step,loss,learning_rate,grad_norm,seconds\n", b"\xff\xfe", "a\n1,x,y,z,w\n", "a\n\0\n"],
)
def test_a_damaged_log_is_a_sentence_or_forgotten(data, content):
    training.train(config(data, steps=1), progress=False)
    (data.parent / "run" / "log.csv").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    try:
        training.train(config(data, steps=2), progress=False)
    except ValueError as error:
        assert "log.csv can't be read" in str(error)
