"""`l2p evaluate`: rules against results computed by hand, folders as the official programs read
them, comparisons against scikit-image's figures."""

import json
import math
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from comfyui_l2p.l2p_core.cli import main
from comfyui_l2p.l2p_core.evaluate import dpg, geneval, metrics
from comfyui_l2p.l2p_core.evaluate.variant import read_variant
from comfyui_l2p.l2p_core.images import read_image
from comfyui_l2p.l2p_core.shapes.scenes import Scene, render
from PIL import Image

FEW = ["--steps", "1", "--height", "32", "--width", "32", "--device", "cpu"]
LEFT, RIGHT = (0, 0, 20, 20), (60, 0, 80, 20)


def found(name, score=0.95, box=LEFT, color=None):
    return geneval.Detection(name, score, box, color)


def wanted(*include, tag="colors", exclude=()):
    return {"tag": tag, "prompt": "p", "include": list(include), "exclude": list(exclude)}


def one(name, count=1, **more):
    return {"class": name, "count": count, **more}


TWO_CATS = [found("cat", 0.95), found("cat", 0.5, RIGHT)]
EXACTLY_ONE = {"include": [one("cat")], "exclude": [one("cat", 2)], "prompt": "p"}


@pytest.mark.parametrize(
    "detections, metadata, right",
    [
        # A score has to be above 0.3, and above 0.9 where objects are counted.
        ([found("cat", 0.31)], wanted(one("cat")), True),
        ([found("cat", 0.3)], wanted(one("cat")), False),
        ([found("cat", 0.31)], wanted(one("cat"), tag="counting"), False),
        (TWO_CATS, {**EXACTLY_ONE, "tag": "counting"}, True),
        (TWO_CATS, {**EXACTLY_ONE, "tag": "colors"}, False),
        # At most 16 of a class: 20 cats are "fewer than 17".
        ([found("cat")] * 20, wanted(one("cat", 16), exclude=[one("cat", 17)]), True),
        # The colour is that of the cat with the highest score.
        (
            [found("cat", 0.5, color="red"), found("cat", 0.8, color="blue")],
            wanted(one("cat", color="blue")),
            True,
        ),
        (
            [found("cat", 0.5, color="red"), found("cat", 0.8, color="blue")],
            wanted(one("cat", color="red")),
            False,
        ),
        (
            [found("cat", color="red"), found("dog", color="red")],
            wanted(one("cat", color="red"), one("dog", color="blue")),
            False,
        ),
        (
            [found("cat"), found("dog", box=RIGHT)],
            wanted(one("cat"), one("dog", position=["right of", 0])),
            True,
        ),
        (
            [found("cat"), found("dog", box=RIGHT)],
            wanted(one("cat"), one("dog", position=["left of", 0])),
            False,
        ),
        # A dog can't be right of a cat that is not there.
        ([found("dog")], wanted(one("cat"), one("dog", position=["right of", 0])), False),
    ],
)
def test_genevals_rules_on_detections_made_by_hand(detections, metadata, right):
    assert (not geneval.faults(detections, metadata)) is right


@pytest.mark.parametrize(
    "one, other, relations",
    [
        # Centres 60 apart across, 0 down; margin 0.1 * (20 + 20) = 4: (56, 0) / 60.
        (RIGHT, LEFT, {"right of"}),
        (LEFT, RIGHT, {"left of"}),
        # Centres 4 apart across, which the margin of 4 takes away.
        ((4, 0, 24, 20), LEFT, set()),
        # Offset (6, 0): beyond the margin 2, and 2 / 6 is below 0.5. With 8, 4 / 8 is not above it.
        ((6, 0, 26, 20), LEFT, set()),
        ((8, 0, 28, 20), LEFT, set()),
        ((9, 0, 29, 20), LEFT, {"right of"}),  # 5 / 9
        # Offset (60, 60), beyond the margin (56, 56): 56 / 84.85 = 0.66 both ways.
        ((60, 60, 80, 80), LEFT, {"right of", "below"}),
        # Offset (60, -20), beyond it (56, -16): 0.885 and -0.253.
        ((60, -20, 80, 0), LEFT, {"right of"}),
    ],
)
def test_positions_by_hand(one, other, relations):
    assert geneval.relations(one, other) == relations


def test_the_overall_score_is_the_mean_of_the_tasks_and_not_of_the_images(tmp_path, capsys):
    def line(number, tag, right):
        row = {"filename": f"{number}.png", "tag": tag, "prompt": f"p{number // 2}"}
        return json.dumps({**row, "correct": right, "reason": "", "metadata": str(number // 2)})

    # counting: 1 of 4 images; colors: 2 of 2. Tasks: (0.25 + 1) / 2 = 0.625; images: 3 / 6.
    # Prompts of two images: p0 has one that is right, p1 none, p2 two: 2 of 3.
    rights = [True, False, False, False, True, True]
    lines = [line(i, "counting" if i < 4 else "colors", right) for i, right in enumerate(rights)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines))
    assert main(["evaluate", "score", "geneval", str(tmp_path / "results.jsonl")]) == 0
    scores = json.loads((tmp_path / "scores-geneval.json").read_text())
    assert scores["overall"] == 0.625 and scores["right_images"] == 0.5
    assert scores["right_prompts"] == pytest.approx(2 / 3)
    assert scores["official"] and "GenEval's own program" in capsys.readouterr().out


def test_detections_of_another_judge_are_never_called_geneval(tmp_path, capsys):
    row = {
        "image": "00000/samples/0000.png",
        "detector": "my detector",
        "metadata": wanted(one("cat")),
        "detections": [{"class": "cat", "score": 0.9, "box": [0, 0, 9, 9]}],
    }
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    assert main(["evaluate", "score", "geneval", str(tmp_path / "d.jsonl")]) == 0
    assert "no official GenEval score" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores-geneval.json").read_text())
    assert scores["judge"] == "my detector" and not scores["official"] and scores["overall"] == 1


CSV = """item_id,text,proposition_id,dependency,tuple,question_natural_language
a,t,1,0,entity - whole (cat),Is there a cat?
a,t,2,1,attribute - color (cat),"Is the cat, if any, red?"
a,t,3,2,attribute - shape (red),Is the red one round?
b,t,1,0,entity - whole (dog),Is there a dog?
b,t,2,1,attribute - color (dog),Is the dog blue?
"""
GIVEN = {  # of each cell, by question
    "a": ["yes no yes", "yes yes yes"],
    "b": ["yes yes", "no yes"],
}


def dpg_lines():
    for item, cells in GIVEN.items():
        for cell, given in enumerate(cells):
            answers = {number: answer for number, answer in enumerate(given.split(), 1)}
            yield {"item_id": item, "cell": cell, "answers": answers, "model": "me"}


def test_dpgs_rules_by_hand_in_both_forms(tmp_path, capsys):
    (tmp_path / "dpg.csv").write_text(CSV)
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, dpg_lines())))
    table = str(tmp_path / "dpg.csv")
    args = ["evaluate", "score", "dpg", str(tmp_path / "answers.jsonl"), "--csv", table]
    assert main(args) == 0
    scores = json.loads((tmp_path / "scores-dpg.json").read_text())
    # a: in cell 0 question 2 is no, so 3 counts as no: 1/3; cell 1: 3/3. Mean 2/3.
    # b: cell 0 2/2; in cell 1 question 1 is no, so 2 counts as no: 0. Mean 1/2.
    corrected = scores["corrected"]
    assert corrected["DPG-Bench"] == round(100 * (2 / 3 + 1 / 2) / 2, 2) == 58.33
    # Categories count what was answered, of all cells. entity: yes yes | yes no. attribute of a:
    # no yes, yes yes; of b: yes, yes: 5 of 6.
    assert corrected["L1"] == {"attribute": 83.33, "entity": 75.0}
    assert corrected["L2"]["attribute - color"] == 75.0
    # Upstream drops question 1 of a, on which 2 depends, so a is lost. Categories are those of b's
    # last cell: no, yes.
    upstream = scores["upstream"]
    assert upstream["DPG-Bench"] == 50.0 and upstream["prompts"] == 1
    assert upstream["L1"] == {"attribute": 100.0, "entity": 0.0}
    assert "question 2 depends on question 1" in upstream["left_out"]["a"]
    assert "me" in capsys.readouterr().out


def test_the_official_programs_answers_are_read(tmp_path):
    (tmp_path / "dpg.csv").write_text(CSV)
    questions = dpg.read_questions(tmp_path / "dpg.csv")
    crops = ["(0, 0, 512, 512)", "(512, 0, 1024, 512)"]
    lines = [
        f"/some, where/{row['item_id']}.png, {crops[row['cell']]}, {question.text}, {answer}"
        for row in dpg_lines()
        for question, answer in zip(questions[row["item_id"]], row["answers"].values())
    ]
    (tmp_path / "r_detail.txt").write_text("\n".join(lines))
    answers, judge = dpg.read_answers(tmp_path / "r_detail.txt", questions)
    assert judge == dpg.OFFICIAL
    assert dpg.score(questions, answers).overall == pytest.approx((2 / 3 + 1 / 2) / 2)


def grid_of(function):
    y, x, channel = np.mgrid[:40, :56, :3]
    return function(x, y, channel).astype(np.uint8)


def test_psnr_and_ssim_are_those_of_scikit_image():
    plain = grid_of(lambda x, y, c: (x * 5 + y * 3 + c * 40) % 256)
    rough = grid_of(lambda x, y, c: (x * 5 + y * 3 + c * 40 + x * y % 17) % 256)
    shift = grid_of(lambda x, y, c: (x * 7 + y * 11 + c) % 9).astype(int) - 4
    near = (plain + shift).clip(0, 255).astype(np.uint8)
    # scikit-image 0.26: peak_signal_noise_ratio, and structural_similarity with gaussian_weights,
    # sigma 1.5 and use_sample_covariance=False.
    for other, psnr, ssim in ((rough, 15.882147, 0.7349026), (near, 39.931841, 0.9760017)):
        images = Image.fromarray(plain), Image.fromarray(other)
        assert metrics.psnr_of(metrics.squared_error(*images)) == pytest.approx(psnr, abs=1e-5)
        assert metrics.ssim(*images) == pytest.approx(ssim, abs=1e-6)
    same = Image.fromarray(plain)
    assert metrics.psnr_of(metrics.squared_error(same, same)) == math.inf
    assert metrics.ssim(same, same) == pytest.approx(1)


METADATA = [
    wanted(one("circle", color="red")),
    wanted(one("square"), tag="counting", exclude=[one("square", 2)]),
]


@pytest.fixture
def prompts(tmp_path):
    lines = [json.dumps({**row, "prompt": f"a red {i} circle"}) for i, row in enumerate(METADATA)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "coco7.txt").write_text("a red circle\n")
    return tmp_path


def write(benchmark, source, output, *more):
    return main(["evaluate", "write", benchmark, str(source), "-o", str(output), *FEW, *more])


def files(folder):
    return {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_a_geneval_folder_is_what_its_program_reads_and_resumes(prompts, monkeypatch):
    source, output = prompts / "metadata.jsonl", prompts / "out"
    for rank in ("1", "0"):  # as torchrun has it; the second process alone is interrupted, say
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert write("geneval", source, output, "--count", "2") == 0
        folders = {name.split("/")[0] for name in files(output)}
        assert folders == ({"00001"} if rank == "1" else {"00000", "00001", *folders})
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    wanted_files = {
        f"0000{item}/{name}"
        for item in range(2)
        for name in ("metadata.jsonl", "grid.png", "samples/0000.png", "samples/0001.png")
    }
    assert files(output).keys() == {*wanted_files, "card.json", "evalscope.jsonl"}
    # GenEval's program: `json.load` of the whole file, the N-th line of the benchmark's
    line = json.loads(source.read_text().splitlines()[1])
    assert json.loads((output / "00001" / "metadata.jsonl").read_text()) == line
    card = json.loads((output / "card.json").read_text())
    assert card["benchmark"] == "geneval" and card["prompts"] == 2 and card["first_seed"] == 42
    assert len(card["checkpoint_sha256"]) == 64 and card["num_inference_steps"] == 1
    rows = [json.loads(line) for line in (output / "evalscope.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["00000-0", "00000-1", "00001-0", "00001-1"]
    assert all(Path(row["image_path"]).is_file() for row in rows)
    assert rows[3]["prompt"] == "a red 1 circle"

    times = {name: file.stat().st_mtime_ns for name, file in files(output).items()}
    lost = output / "00001" / "samples" / "0000.png"
    pixels = read_image(lost).tobytes()
    lost.unlink()
    assert write("geneval", source, output, "--count", "2") == 0
    assert read_image(lost).tobytes() == pixels
    later = {name: file.stat().st_mtime_ns for name, file in files(output).items()}
    changed = {name for name in times if times[name] != later[name]}
    assert changed == {"00001/samples/0000.png", "00001/grid.png"}


@pytest.mark.slow
def test_dpgs_grids_have_a_square_cell_for_each_image(prompts, capsys):
    output = prompts / "out"
    assert write("dpg", prompts / "prompts", output) == 0
    assert [file.name for file in (output / "grids").iterdir()] == ["coco7.png"]
    grid = read_image(output / "grids" / "coco7.png")
    assert grid.size == (64, 64)
    # as DPG-Bench's program cuts it
    boxes = [(0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)]
    for copy, box in enumerate(boxes):
        sample = output / "00000" / "samples" / f"000{copy}.png"
        assert grid.crop(box).tobytes() == read_image(sample).tobytes()
    assert write("dpg", prompts / "prompts", prompts / "wide", "--width", "48") == 1
    assert "48 x 32" in capsys.readouterr().err and not (prompts / "wide").exists()


@pytest.fixture(scope="module")
def ideal(tmp_path_factory):
    """A folder in the layout of every benchmark, with ideal images of four scenes but for the
    last, which shows a square where its prompt says circle."""
    folder = tmp_path_factory.mktemp("ideal")
    for number, shape in enumerate(("circle", "square", "triangle", "square")):
        scene = Scene(shape, "red", "blue", "large", "center")
        said = "circle" if number == 3 else shape
        include, exclude = one(said, color="red"), one(said, 2)
        row = wanted(include, tag="shapes", exclude=[exclude])
        row |= {"prompt": f"a <b>{said}</b>", "scene": {**vars(scene), "shape": said}}
        inner = folder / f"{number:05d}"
        (inner / "samples").mkdir(parents=True)
        render(scene).save(inner / "samples" / "0000.png")
        (inner / "metadata.jsonl").write_text(json.dumps(row))
    return folder


def test_the_shapes_judge_runs_through_the_same_rules(ideal, capsys):
    for benchmark, more in (("shapes", ()), ("geneval", ("--detector", "shapes"))):
        assert main(["evaluate", "score", benchmark, str(ideal), *more, "--device", "cpu"]) == 0
    shapes = json.loads((ideal / "scores-shapes.json").read_text())["percent"]
    assert (shapes["right"], shapes["shape"], shapes["colour"]) == (75.0, 75.0, 100.0)
    scores = json.loads((ideal / "scores-geneval.json").read_text())
    assert scores["overall"] == 0.75 and scores["judge"] == "the shapes judge"
    capsys.readouterr()
    before = (ideal / "detections.jsonl").stat().st_mtime_ns
    assert main(["evaluate", "score", "geneval", str(ideal), "--detector", "shapes"]) == 0
    assert "4 of 4 images were judged already" in capsys.readouterr().out
    assert (ideal / "detections.jsonl").stat().st_mtime_ns == before

    page = (ideal / "report-geneval.html").read_text()
    assert "http" not in page and "<b>" not in page, "it opens offline, and prompts are no HTML"
    links = re.findall(r'src="([^"]+)"', page)
    assert len(links) == 4 and all((ideal / unquote(link)).is_file() for link in links)
    assert page.count("<span>") == 1, "one image is wrong, and the page says why"


@pytest.mark.slow
def test_compare_tells_what_a_change_costs(tmp_path, capsys, monkeypatch):
    stand_in = ModuleType("lpips")  # a distance of its form: of (1, 3, H, W) in [-1, 1]
    stand_in.__spec__ = ModuleSpec("lpips", None)
    distance = SimpleNamespace(eval=lambda: lambda one, other: (one - other).abs().mean())
    stand_in.LPIPS = lambda net, verbose: distance
    monkeypatch.setitem(sys.modules, "lpips", stand_in)
    variants = ["bundled", "bundled:batch-guidance=true", "bundled:steps=2,dtype=float32"]
    more = ["--prompts", "shapes", "--limit", "2", "--batch", "2", "--dtype", "bfloat16", *FEW]
    output = tmp_path / "out"
    assert main(["evaluate", "compare", *variants, "-o", str(output), *more]) == 0
    rows = json.loads((output / "compare.json").read_text())["compared"]
    cards = [row["card"] for row in rows]
    assert [card["num_inference_steps"] for card in cards] == [1, 1, 2]
    assert [card["dtype"] for card in cards] == ["bfloat16", "bfloat16", "float32"]
    assert all("right" in row["shapes"] for row in rows) and "psnr" not in rows[0]
    # the figures of the third, from its files
    folders = [next(output.glob(f"{index}-*")) for index in range(3)]
    pairs = [
        [np.asarray(read_image(folder / name), float) for folder in (folders[0], folders[2])]
        for name in ("00000/samples/0000.png", "00001/samples/0000.png")
    ]
    errors = [np.square(one - other).mean() for one, other in pairs]
    assert rows[2]["psnr"] == pytest.approx(10 * math.log10(255**2 / np.mean(errors)))
    assert rows[2]["worst_psnr"] == pytest.approx(10 * math.log10(255**2 / max(errors)))
    assert rows[2]["images"] == 2 and rows[2]["same"] == 0
    apart = np.mean([np.abs(one - other).mean() for one, other in pairs]) / 127.5
    assert rows[2]["lpips"] == pytest.approx(apart, rel=1e-4)
    assert Image.open(output / "worst-2.png").size[0] > 3 * 256

    capsys.readouterr()
    folders = [str(folders[0]), str(folders[0])]
    assert main(["evaluate", "compare", *folders, "-o", str(tmp_path / "same")]) == 0
    assert "the same" in capsys.readouterr().out
    assert not (tmp_path / "same" / "worst-1.png").exists()


def test_a_variant_is_a_checkpoint_and_its_settings():
    variant = read_variant("a:b/model.safetensors:sampler=ab2,steps=18,cfg-scale=3,offload=true")
    assert variant.checkpoint == "a:b/model.safetensors"
    assert variant.settings == {"sampler": "ab2", "num_inference_steps": 18, "cfg_scale": 3.0}
    assert variant.options == {"offload": True}
    assert read_variant("bundled").checkpoint is None


DETECTION = {"class": "cat", "score": 0.9, "box": [0, 0, 9, 9]}
LINE = {"image": "a.png", "metadata": wanted(one("cat", color="red")), "detections": [DETECTION]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({}, "a cat has no color"),
        ({"detections": [{**DETECTION, "score": "high"}]}, "score is 'high'"),
        ({"detections": [{**DETECTION, "box": [1, 2]}]}, "box is [1, 2]"),
        ({"detections": None}, "no list of detections"),
        ({"metadata": wanted(one("cat", 0))}, "count 0"),
        ({"metadata": wanted(one("cat", position=["under", 0]))}, "position ['under', 0]"),
        ({"metadata": {"tag": "x"}}, "prompt is None"),
        ({"image": 3}, "image is 3"),
    ],
)
def test_files_that_can_not_be_scored_end_in_a_sentence(tmp_path, capsys, change, message):
    (tmp_path / "d.jsonl").write_text(json.dumps({**LINE, **change}))
    assert main(["evaluate", "score", "geneval", str(tmp_path / "d.jsonl")]) == 1
    told = capsys.readouterr().err
    assert message in told and "d.jsonl, line 1" in told and told.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["d.jsonl"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("score geneval {0}", "holds no detections.jsonl"),
        ("score shapes {0}", "holds no images"),
        ("score dpg {0}", "--csv"),
        ("score geneval {0}/none", "there is no"),
        ("write shapes --limit 1 -o {0}/a.png", "give a folder"),
        ("write geneval -o {0}/out", "without its prompts"),
        ("write dpg {0} -o {0}/out", "holds no .txt"),
        ("write shapes --limit 0 -o {0}/out", "--limit is 0"),
        ("compare bundled -o {0}/out", "two or more"),
        ("compare bundled bundled -o {0}/out", "--prompts"),
        ("compare bundled bundled:speed=9 --prompts shapes -o {0}/out", "'speed=9' is no setting"),
        ("compare bundled bundled:steps=0 --prompts shapes -o {0}/out", "num_inference_steps is 0"),
    ],
)
def test_commands_that_make_no_sense_end_in_a_sentence(tmp_path, capsys, arguments, message):
    assert main(["evaluate", *arguments.format(tmp_path).split()]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())
