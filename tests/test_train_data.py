"""Folders as other trainers take them, the sizes images are trained at, and what makes a batch."""

import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_l2p.l2p_core import flow
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.train import dataset
from comfyui_l2p.l2p_core.train import run as training
from comfyui_l2p.l2p_core.train.buckets import bucket_shapes, bucket_size, plan_epoch, report
from comfyui_l2p.l2p_core.train.config import read_config, to_toml
from comfyui_l2p.l2p_core.train.data import Batches, weight_of
from comfyui_l2p.l2p_core.train.dataset import (
    Example,
    Reading,
    folders_of,
    hold_out,
    read_data,
    read_examples,
)
from PIL import Image
from small_runs import config, losses, make_data


@pytest.fixture
def data(tmp_path):
    return make_data(tmp_path / "data")


def image(file: Path, colour: str = "red", size: tuple[int, int] = (96, 96)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


def sized(*sizes: tuple[int, int]) -> list[Example]:
    return [Example(Path(str(n)), ("",), None, size) for n, size in enumerate(sizes)]


def test_captions_beside_the_images_are_read(tmp_path):
    image(tmp_path / "b.png")
    image(tmp_path / "a.jpg")
    image(tmp_path / "a-masklabel.png")
    (tmp_path / "a.txt").write_text("\ufeffa red\n square ", encoding="utf-8")
    (tmp_path / "b.caption").write_text("another")
    examples = read_examples(tmp_path, None, 96 * 96, 16)
    assert [(each.name, each.captions) for each in examples] == [
        ("a.jpg", ("a red square",)),
        ("b.png", ("another",)),
    ]
    (tmp_path / "b.caption").unlink()
    with pytest.raises(ValueError, match="row 2: b.png: no caption"):
        read_examples(tmp_path, None, 96 * 96, 16)


def test_every_caption_gets_the_trigger_word(tmp_path):
    for name, caption in (("a", "a [trigger] star"), ("b", "sks again"), ("c", "a star")):
        image(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(caption)
    image(tmp_path / "d.png")
    examples = read_examples(tmp_path, None, 96 * 96, 16, reading=Reading(trigger="sks"))
    assert [each.captions[0] for each in examples] == [
        "a sks star",
        "sks again",
        "sks, a star",
        "sks",
    ]


@pytest.mark.parametrize("separator, name", [(";", "csv"), ("\t", "csv"), ("\t", "tsv")])
def test_tables_of_other_separators_and_columns_are_read(tmp_path, separator, name):
    image(tmp_path / "a.png")
    lines = [["file_name", "text", "long_text"], ["a.png", "a star, red", "a long, red star"]]
    (tmp_path / f"metadata.{name}").write_text("\n".join(map(separator.join, lines)))
    assert read_examples(tmp_path, None, 96 * 96, 16)[0].captions == ("a star, red",)
    reading = Reading(caption_column="long_text")
    assert read_examples(tmp_path, None, 96 * 96, 16, reading=reading)[0].captions == (
        "a long, red star",
    )
    with pytest.raises(ValueError, match="no column short.*its columns are file_name, text"):
        read_examples(tmp_path, None, 96 * 96, 16, reading=Reading(caption_column="short"))


def test_folders_have_repeats(tmp_path):
    for name in ("kohya/3_star", "kohya/1_moon", "plain"):
        image(tmp_path / name / "a.png")
        (tmp_path / name / "a.txt").write_text(name)
    given = (str(tmp_path / "kohya"), f"{tmp_path / 'plain'}:2")
    assert folders_of(given) == [
        (tmp_path / "kohya" / "1_moon", 1),
        (tmp_path / "kohya" / "3_star", 3),
        (tmp_path / "plain", 2),
    ]
    found = read_data(replace(config(tmp_path), data=given), 96 * 96, 16, 1, False)
    epoch = [each.captions[0] for each in found.epoch(found.main)]
    assert sorted(epoch) == ["kohya/1_moon"] + 3 * ["kohya/3_star"] + 2 * ["plain"]


def test_every_image_is_trained_at_each_resolution(data):
    """Four squares of 96 x 96 and two images of 128 x 64, in areas of 96 x 96 and of 64 x 64."""
    found = read_data(config(data, resolutions=(64, 96)), 96 * 96, 16, 1, False)
    assert len(found.main) == 6
    assert Counter(each.size for each in found.epoch(found.main)) == {
        (96, 96): 4,
        (64, 64): 4,
        (64, 128): 2,
        (32, 80): 2,
    }
    small = read_data(config(data, resolutions=(96, 128)), 128 * 128, 16, 1, False)
    assert len(small.epoch(small.main)) == 6, "no image is larger, so none has two sizes"


def test_flags_and_files_give_resolutions(data, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config(data, resolutions=(64, 96))))
    assert read_config(file, {}).resolutions == (64, 96)
    with pytest.raises(ValueError, match="expected a list of whole numbers"):
        read_config(file, {"resolutions": ["64"]})
    with pytest.raises(ValueError, match="leave out height, width and max_pixels"):
        read_config(file, {"max_pixels": 4096})


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"regularization": ("nowhere",)}, "nowhere is no folder"),
        ({"held_out": 6, "sample_every": 1}, "there are 6 images in all"),
        ({"batch": 7}, "a step takes 7 images"),
        ({"held_out": 3, "sample_every": 1, "batch": 4}, "there are 3 to train on"),
        ({"noise": "paired"}, "have no seeds"),
    ],
)
def test_cheap_checks_come_before_images_are_read(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(dataset, "check_image", lambda *_: pytest.fail("an image is read"))
    data = make_data(tmp_path / "data", seeds=False)
    with pytest.raises(ValueError, match=words):
        training.train(config(data, **changes), progress=False)


def test_a_missing_package_is_named_first(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(training, "read_data", lambda *_: pytest.fail("images are read"))
    with pytest.raises(ImportError, match=r"need peft: pip install 'comfyui-l2p\[train\]'"):
        training.train(config(data, lora_rank=4), progress=False)


def test_regularization_images_are_as_many_as_the_others(tmp_path):
    for number in range(3):
        image(tmp_path / "main" / f"{number}.png")
        (tmp_path / "main" / f"{number}.txt").write_text("a star")
    image(tmp_path / "class" / "a.png", "blue")
    (tmp_path / "class" / "a.txt").write_text("a shape")
    settings = replace(
        config(tmp_path / "main"),
        regularization=(str(tmp_path / "class"),),
        regularization_weight=0.5,
        trigger="sks",
    )
    found = read_data(settings, 96 * 96, 16, 1, False)
    epoch = found.epoch(found.main)
    assert [(each.captions[0], each.weight) for each in epoch] == 3 * [("sks, a star", 1.0)] + 3 * [
        ("a shape", 0.5)
    ]


def test_the_loss_is_that_of_what_the_mask_leaves_white(data):
    """Against the formula longhand, through a run's own batch."""
    mask = Image.new("L", (96, 96), 0)
    mask.paste(255, (0, 0, 48, 96))
    (data / "masks").mkdir()
    for number in range(4):
        mask.save(data / "masks" / f"{number}.png")
    examples = read_examples(data, (96, 96), 0, 16, reading=Reading(masks=True))
    assert [each.mask is not None for each in examples] == [True] * 4 + [False] * 2
    weight = weight_of(examples[0], 0.0)
    expected = torch.zeros(1, 1, 96, 96)
    expected[..., :48] = 2
    assert torch.allclose(weight, expected)
    captions = {each.captions[0]: torch.zeros(1, 1) for each in examples}
    batch = Batches(examples[:2], captions, config(data, masked_loss=True), 16)[0]
    error = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    error[..., 48:] *= 2

    def model(x, t, prompt_embeds):
        return -(batch.noise - batch.images + error)

    loss = flow.flow_matching_loss(
        model, batch.images, batch.captions, batch.noise, batch.sigma, batch.weight
    )
    assert torch.allclose(loss, error[..., :48].square().mean(), rtol=1e-5)
    assert not torch.allclose(loss, error.square().mean(), rtol=1e-3)


def test_a_black_mask_is_named(data):
    (data / "masks").mkdir()
    Image.new("L", (96, 96)).save(data / "masks" / "1.png")
    with pytest.raises(ValueError, match="row 2: 1.png: its mask is black"):
        read_examples(data, None, 96 * 96, 16, reading=Reading(masks=True))


@pytest.mark.parametrize("side, multiple", [(1024, 16), (4096, 64), (10240, 320)])
def test_the_fixed_shapes_are_near_the_trained_area(side, multiple):
    shapes = bucket_shapes(side**2, multiple)
    assert 11 <= len(shapes) <= 13 and (side, side) in shapes
    for height, width in shapes:
        assert height % multiple == width % multiple == 0
        assert 0.85 * side**2 <= height * width <= side**2
        assert (width, height) in shapes


def test_images_take_few_shapes_with_little_crop():
    """Web images of 40 aspect ratios from 1:2 to 2:1, and small ones, which are not enlarged by
    more than a tenth."""
    rng = random.Random(0)
    sizes = []
    for _ in range(40):
        aspect, pixels = 2 ** rng.uniform(-1, 1), rng.uniform(1.3e6, 6e6)
        height = int((pixels / aspect) ** 0.5)
        size = bucket_size(height, int(height * aspect), 1024**2, 16)
        kept = min(size[1] / size[0] / aspect, aspect / (size[1] / size[0]))
        assert kept > 0.87
        sizes.append(size)
    assert len(set(sizes)) <= 11
    assert bucket_size(530, 530, 1024**2, 16) == (512, 512)
    assert bucket_size(1000, 1000, 1024**2, 16) == (1024, 1024)
    told = report([replace(each, pixels=(9, 9)) for each in sized((16, 16), (16, 32))], 2)
    assert "16 x 16: 1 image, 0 % cropped" in told and "32 x 16: 1 image, 50 % cropped" in told


def test_batches_hold_no_image_twice_however_many_processes_share_them():
    rng = random.Random(1)
    for count in range(4, 30):
        examples = sized(*((64, 64 + 16 * rng.randrange(5)) for _ in range(count)))
        plans = [
            plan_epoch(examples, batch, processes, 0, 0)
            for batch, processes in ((4, 1), (2, 2), (1, 4))
        ]
        assert plans[0] == plans[1] == plans[2]
        assert all(len(set(row)) == 4 for row in plans[0])
        assert set(sum(plans[0], [])) == set(range(count)) and len(plans[0]) == -(-count // 4)


def test_fewer_images_than_a_step_takes_are_rejected(data):
    with pytest.raises(ValueError, match="a step takes 8 images.*there are 6"):
        training.train(config(data, batch=8), progress=False)


@pytest.mark.slow
def test_a_batch_of_two_sizes_has_the_gradient_of_its_images_one_by_one(data):
    """A batch of all six, four squares and two wide, as six accumulated batches of one each."""
    at_once = training.train(config(data, batch=6, steps=1, noise="paired"), progress=False)
    found = losses(at_once.parent)
    run = training.Run(
        config(data, batch=6, steps=1, output=str(data.parent / "other")), progress=False
    )
    passes = run.passes(0)
    assert sorted(len(each.sigma) for each in passes) == [2, 4]
    with torch.no_grad():
        one_by_one = [
            run.loss(
                replace(
                    each,
                    images=each.images[[n]],
                    captions=[each.captions[n]],
                    noise=each.noise[[n]],
                    sigma=each.sigma[[n]],
                )
            ).item()
            for each in passes
            for n in range(len(each.sigma))
        ]
    assert found[0][1] == pytest.approx(sum(one_by_one) / 6, rel=1e-5)


def test_the_validation_set_follows_from_the_contents(data):
    examples = read_examples(data, None, 96 * 96, 16)
    rest, held = hold_out(examples, 2, 0)
    assert len(held) == 2 and not {each.file for each in rest} & {each.file for each in held}
    shuffled = [replace(each, name="other") for each in reversed(examples)]
    assert {each.file for each in hold_out(shuffled, 2, 0)[1]} == {each.file for each in held}
    copy = replace(held[0], file=Path("copy.png"))
    assert copy in hold_out([copy, *examples], 2, 0)[1]  # else it would be learned from


@pytest.mark.slow
@pytest.mark.parametrize("changes, resumes", [({}, True), ({"held_out": 2}, False)])
def test_a_run_of_the_first_version_resumes_or_says_why_not(data, changes, resumes):
    settings = config(data, steps=1, sample_every=1, sample_steps=1, **changes)
    training.train(settings, progress=False)
    file = data.parent / "run" / "resume.pt"
    state = torch.load(file)
    del state["batching"]
    torch.save(state, file)
    if resumes:
        training.train(replace(settings, steps=2), progress=False)
        return
    with pytest.raises(ValueError, match="of an earlier version, which chose the validation set"):
        training.train(replace(settings, steps=2), progress=False)


@pytest.mark.slow
def test_other_repeats_are_another_run(data):
    training.train(config(data, steps=1), progress=False)
    with pytest.raises(ValueError, match="a run with other batches: .*repeats"):
        training.train(replace(config(data, steps=2), data=f"{data}:2"), progress=False)


def test_flags_may_have_underscores_and_unknown_ones_are_named(data, capsys):
    flags = ["train", "--checkpoint", "nothing", "--data", str(data), "--output", "nowhere"]
    assert main([*flags, "--learning_rate=1e-4"]) == 1
    assert "nothing does not exist" in capsys.readouterr().err
    assert main([*flags, "--mixed-precision", "fp16"]) == 1
    assert "float16 overflows" in (said := capsys.readouterr().err) and "usage" not in said
    with pytest.raises(SystemExit):
        main([*flags, "--learnin_rate", "1e-4"])
    assert "did you mean --learning-rate?" in capsys.readouterr().err


def test_a_missing_text_encoder_is_reported_before_images_are_read(data, monkeypatch):
    monkeypatch.setattr(training, "read_data", lambda *_: pytest.fail("images are read"))
    with pytest.raises(ValueError, match="text encoder .* does not exist"):
        training.train(config(data, text_encoder="nowhere"), progress=False)
