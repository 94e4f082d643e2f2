"""A run in a process of its own: followed, stopped and explained by its files. A stand-in takes the
place of `l2p train`, whose start takes seconds."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from comfyui_l2p.l2p_core.train import process
from comfyui_l2p.l2p_core.train.config import TrainConfig
from comfyui_l2p.l2p_core.train.process import TrainingError, TrainingProcess, duration
from PIL import Image


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(program) → a TrainingProcess that runs this Python program, in the run's folder."""
    started = []

    def starter(program: str) -> TrainingProcess:
        (tmp_path / "__main__.py").write_text(program)
        monkeypatch.setattr(process, "PACKAGE", tmp_path)
        config = TrainConfig(checkpoint="c", data="d", output=str(tmp_path / "run"), steps=100)
        started.append(TrainingProcess(config))
        return started[-1]

    yield starter
    for each in started:
        each.kill()


@pytest.mark.parametrize(
    "program, reason",
    [
        (
            "print('l2p: note: small images'); print('l2p: data has 2 faults:\\nrow 1\\nrow 2');"
            " exit(1)",
            r"^data has 2 faults:\nrow 1\nrow 2$",
        ),
        ("raise RuntimeError('of torch')", r"status 1: RuntimeError: of torch\. .*training\.log"),
        pytest.param(
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "memory ran out",
            marks=pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL"),
        ),
        ("exit(3)", "status 3: it printed nothing"),
    ],
)
def test_a_failure_becomes_one_message(start, program, reason):
    (run := start("print('l2p: of a run before'); exit(1)")).process.wait()
    again = start(program)
    assert again.log == run.log  # which still holds what the first one said
    with pytest.raises(TrainingError) as raised:
        again.result()
    assert re.search(reason, str(raised.value))
    assert "of a run before" not in str(raised.value)


def test_progress_is_read_from_the_files_of_the_run(start, tmp_path):
    (tmp_path / "run").mkdir()
    log = tmp_path / "run" / "log.csv"
    log.write_text("step,loss,learning_rate,grad_norm,seconds\n1,9,1,1,1\n")
    run = start("import sys; sys.stdin.read()")
    assert run.rows() == []  # they are of the run before, which this one has not taken up yet
    run.log.write_text("\rencoding captions:  40%|#### | 4/10 [00:01<00:01]\rloading")
    assert run.status([]) == "encoding captions: 40 %"
    rows = "".join(f"{step},{step / 100},1,1,3\n" for step in range(1, 41))
    log.write_text(f"step,loss,learning_rate,grad_norm,seconds\n{rows}")
    assert run.status(run.rows()) == "step 40 of 100, loss 0.3050, 3 min left"  # 60 steps of 3 s

    (tmp_path / "run" / "samples").mkdir()
    for step, colour in ((0, "red"), (30, "blue")):
        Image.new("RGB", (32, 16), colour).save(tmp_path / f"run/samples/step-{step:07d}.png")
    preview = run.preview(run.rows())
    assert preview.size == (process.PREVIEW_WIDTH, 384 + 384)  # 2 : 1 each
    assert preview.getpixel((9, 9)) == (0, 0, 255)


@pytest.mark.parametrize(
    "seconds, said", [(4.4, "4 s"), (89, "89 s"), (91, "2 min"), (5400, "1 h 30 min")]
)
def test_durations(seconds, said):
    assert duration(seconds) == said


WATCHED = """
import sys
from pathlib import Path
from comfyui_l2p.l2p_core.interrupt import noted, stop_at_eof
stop_at_eof()
with noted() as asked:
    Path(sys.argv[1], "ready").touch()
    asked.wait(30)
    Path(sys.argv[1], "saved").touch()
"""
STARTER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stdin=subprocess.PIPE)
time.sleep(60)
"""


def test_it_saves_where_the_program_that_started_it_is_killed(tmp_path):
    starter = subprocess.Popen([sys.executable, "-c", STARTER, WATCHED, str(tmp_path)])
    wait_for(tmp_path / "ready")
    assert not (tmp_path / "saved").exists()
    starter.kill()
    wait_for(tmp_path / "saved")


def test_stop_is_the_end_of_its_input(start, tmp_path):
    run = start(f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]; exec({WATCHED!r})")
    wait_for(tmp_path / "ready")
    assert run.is_running()
    run.stop()
    assert run.process.wait(20) == 0
    assert (tmp_path / "saved").exists() and run.result() is None


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not appear"
        time.sleep(0.05)
