"""Kill the programs at random moments, feed them broken headers, and check that nothing is lost.

    python benchmarks/reliability.py files --count 500      SIGKILL export, merge and quantize
    python benchmarks/reliability.py generate --count 80    SIGKILL l2p generate
    python benchmarks/reliability.py train --count 80       SIGKILL l2p train
    python benchmarks/reliability.py headers --count 10000  read broken headers

Each prints what it counted and exits with 1 at the first loss. The killed programs are forks of
this one, which has imported torch and used none of it, so that a kill takes no import. For Linux
and macOS."""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator  # noqa: F401
from comfyui_l2p.l2p_core.cli import main as l2p
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from comfyui_l2p.l2p_core.train import run as training  # noqa: F401
from comfyui_l2p.quant import export, merge, quantize  # noqa: F401
from PIL import Image
from tokenizers import Tokenizer  # noqa: F401, imported once for all forks

MODEL = BUNDLED_MODEL / "transformer.safetensors"
PROMPTS = [
    f"a large {colour} circle on a blue background, left"
    for colour in ("red", "green", "yellow", "white")
]
HIDDEN = ".l2p-"  # in the names of temporary files and locks


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("files", "generate", "train", "headers"))
    parser.add_argument("--count", type=int, default=100, help="kills, or headers (default 100)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments and of the broken headers (default 0)"
    )
    args = parser.parse_args()
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="l2p-reliability-") as folder:
        os.chdir(folder)
        work = {
            "files": kill_file_tools,
            "generate": kill_generate,
            "train": kill_train,
            "headers": break_headers,
        }
        counted = work[args.what](args.count, random.Random(args.seed))
        os.chdir("/")
    print(json.dumps({"what": args.what, **counted, "seconds": round(time.time() - began)}))


def start(program: Callable[[], object]) -> int:
    """Run it in a fork, silently; return its process id."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    status = 1
    try:
        status = int(program() or 0)
    finally:
        os._exit(status)


def finish(program: Callable[[], object]) -> float:
    """Run it to its end; return its seconds."""
    began = time.time()
    _, status = os.waitpid(start(program), 0)
    assert status == 0, "it failed"
    return time.time() - began


def kill(program: Callable[[], object], seconds: float) -> bool:
    """Run it and SIGKILL it after so long; return whether it was still running."""
    child = start(program)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, "it failed before it was killed"
    return os.WIFSIGNALED(status)


def hidden(folder: Path) -> list[str]:
    return [file.name for file in folder.rglob("*") if HIDDEN in file.name]


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tensors(file: Path) -> bytes:
    """A safetensors file without its header, which names the run's folder."""
    content = file.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def kill_file_tools(count: int, rng: random.Random) -> dict:
    """The target is always the old file or a whole new one. What is left is removed by the next
    tool in the folder."""
    shutil.copy(MODEL, "model.safetensors")
    tools = {
        "export": ["export", "model.safetensors", "--dtype", "fp32"],
        "merge": ["merge", "--trained", "model.safetensors", "--base", "model.safetensors"],
        "quantize": ["quantize", "model.safetensors", "--preset", "small"],
    }
    folder, counted = Path("out"), Counter()
    folder.mkdir()
    target = folder / "model.safetensors"
    new, took = {}, {}
    for name, command in tools.items():
        took[name] = finish(lambda: l2p([*command, "-o", str(target)]))
        new[name] = sha256(target)
    last = new["quantize"]
    while counted["killed"] < count:
        name = rng.choice(list(tools))
        counted["killed"] += kill(
            lambda: l2p([*tools[name], "-o", str(target)]), rng.random() * took[name]
        )
        found = sha256(target)
        assert found in (last, new[name]), f"a killed {name} lost the file"
        counted["old file"] += found == last
        counted["left something"] += bool(hidden(folder))
        last = found
    finish(lambda: l2p([*tools["merge"], "-o", str(folder / "other.safetensors")]))
    assert not hidden(folder), "what killed runs left was not removed"
    return dict(counted)


def kill_generate(count: int, rng: random.Random) -> dict:
    """Every PNG that is there is whole and the right image, and the last run finishes the
    folder."""
    Path("prompts.txt").write_text("\n".join(PROMPTS))
    command = ["generate", "--prompts", "prompts.txt", "--steps", "1", "--device", "cpu"]
    took = finish(lambda: l2p([*command, "-o", "wanted"]))
    wanted = {file.name: pixels(file) for file in Path("wanted").iterdir()}
    folder, counted = Path("out"), Counter()
    while counted["killed"] < count:
        counted["killed"] += kill(lambda: l2p([*command, "-o", "out"]), rng.random() * took)
        for file in folder.glob("*.png"):
            assert pixels(file) == wanted[file.name], f"a kill spoiled {file.name}"
        counted["left something"] += folder.exists() and bool(hidden(folder))
        if folder.exists() and len(list(folder.glob("*.png"))) == len(wanted):
            finish(lambda: l2p([*command, "-o", "out"]))
            assert not hidden(folder), "what killed runs left was not removed"
            shutil.rmtree(folder)
            counted["folders finished"] += 1
    finish(lambda: l2p([*command, "-o", "out"]))
    assert {file.name: pixels(file) for file in folder.iterdir()} == wanted
    return dict(counted)


def pixels(file: Path) -> bytes:
    with Image.open(file) as image:
        return image.tobytes()


def kill_train(count: int, rng: random.Random) -> dict:
    """A run that is killed again and again ends with the weights and the log of one that was
    not."""
    data = Path("data")
    data.mkdir()
    rows = ["file_name,text,seed"]
    for number in range(4):
        Image.effect_noise((96, 96), 50).convert("RGB").save(data / f"{number}.png")
        rows.append(f"{number}.png,a red star {number},{number}")
    (data / "metadata.csv").write_text("\n".join(rows) + "\n")
    command = [
        "train",
        "--checkpoint",
        str(MODEL),
        "--data",
        "data",
        "--device",
        "cpu",
        "--mixed-precision",
        "no",
        "--freeze",
        "1:-1",
        "--save-every",
        "1",
        "--sample-every",
        "2",
        "--sample-steps",
        "1",
        "--sample-prompts",
        "a red star",
        "--steps",
        "4",
    ]
    took = finish(lambda: l2p([*command, "--output", "wanted"]))
    wanted, counted = tensors(Path("wanted/step-4.safetensors")), Counter()
    run = Path("run")

    def finished() -> bool:
        finish(lambda: l2p([*command, "--output", "run"]))
        steps = [line.split(",")[0] for line in (run / "log.csv").read_text().splitlines()[1:]]
        assert steps == ["1", "2", "3", "4"], f"the log holds steps {steps}"
        assert tensors(run / "step-4.safetensors") == wanted, "the weights are others"
        assert not hidden(run), "what killed runs left was not removed"
        shutil.rmtree(run)
        return True

    while counted["killed"] < count:
        counted["killed"] += kill(lambda: l2p([*command, "--output", "run"]), rng.random() * took)
        counted["left something"] += run.exists() and bool(hidden(run))
        if (run / "step-4.safetensors").exists() or rng.random() < 0.1:
            counted["runs finished as if never killed"] += finished()
    counted["runs finished as if never killed"] += finished()
    return dict(counted)


def break_headers(count: int, rng: random.Random) -> dict:
    """Check that each broken header is read or rejected in words, quickly and in little memory."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    import resource

    from comfyui_l2p.l2p_core import CheckpointError, read_layout
    from test_hostile import header_of, use, write_broken

    whole, rejected, slowest = read_layout(MODEL), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source, path = header_of(MODEL), Path("hostile.safetensors")
    for _ in range(count):
        write_broken(path, *source, rng)
        began = time.process_time()
        try:
            use(path, whole)
        except CheckpointError:
            rejected += 1
        slowest = max(slowest, time.process_time() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "headers": count,
        "rejected": rejected,
        "slowest, CPU seconds": round(slowest, 2),
        "memory grew, MB": grown // 1024,
    }


if __name__ == "__main__":
    main()
