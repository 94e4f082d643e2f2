"""Kill a node of a Ray cluster during a prompt list and during requests, and time the workers.

    python benchmarks/cluster.py          (about five minutes on two CPU cores)

The nodes are processes on this machine, of one CPU each; the model is the bundled one.

    list      100 prompts, a node killed after 20 images.
    requests  50 requests by HTTP from 8 clients, a node killed after 10 images.
    speed     Images per second of 1, 2 and 4 workers of one thread, and of `l2p generate` without
              Ray; from the first image to the last, without starting up.

It exits with 1 where an image was lost or differs. For Linux."""

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from comfyui_l2p.l2p_core.cli import main as l2p
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from serving import image_of, serving
from test_cluster import Cluster, pixels, wait_for

PROMPT = "a large red circle on a blue background"
PARTS = ("list", "requests", "speed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=PARTS, help="default: all")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--steps", type=int, default=4, help="of each image (default 4)")
    args = parser.parse_args()
    lost = 0
    cluster = Cluster()
    cluster.add()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        alone = generate(folder / "alone", args)
        if "list" in args.parts:
            lost += measure_list(cluster, folder / "list", args)
            cluster.add()
        if "requests" in args.parts:
            lost += measure_requests(cluster, folder / "alone", args)
            cluster.add()
        if "speed" in args.parts:
            measure_speed(cluster, folder, alone, args)
    cluster.local.shutdown()
    sys.exit(int(lost > 0))


def command_of(folder: Path, args: argparse.Namespace, *flags: str) -> list[str]:
    count = ["--seed", "0", "--count", str(args.images), "--steps", str(args.steps)]
    return ["generate", PROMPT, *count, "--device", "cpu", "-o", str(folder), *flags]


def generate(folder: Path, args: argparse.Namespace, *flags: str) -> float:
    """Generate the images; returns how many a second, from the second one on."""
    if l2p(command_of(folder, args, *flags)):
        sys.exit("l2p generate failed")
    times = sorted(file.stat().st_mtime for file in folder.glob("*.png"))
    return (len(times) - 1) / (times[-1] - times[0])


def measure_list(cluster: Cluster, folder: Path, args: argparse.Namespace) -> int:
    command = command_of(folder, args, "--ray", cluster.address)
    with subprocess.Popen([sys.executable, "-m", "comfyui_l2p", *command]):
        wait_for(lambda: len(list(folder.glob("*.png"))) >= args.images // 5)
        cluster.kill()
    wanted, found = pixels(folder.parent / "alone"), pixels(folder)
    equal = sum(found.get(name) == image for name, image in wanted.items())
    print(f"list: {len(found)} images, {equal} of {args.images} equal, a node killed")
    return args.images - equal + len(found.keys() - wanted.keys())


def measure_requests(cluster: Cluster, alone: Path, args: argparse.Namespace) -> int:
    with serving("--ray", cluster.address) as server, ThreadPoolExecutor(8) as clients:

        def ask(seed: int) -> bytes:
            answer = server.generate(prompt=PROMPT, seed=seed, num_inference_steps=args.steps)
            return image_of(answer["data"][0]["b64_json"]).tobytes()

        answers = [clients.submit(ask, seed) for seed in range(args.requests)]
        answers[args.requests // 5].result()
        cluster.kill()
        found = [answer.result() for answer in answers]
        restarts = server.metric("l2p_worker_restarts_total")
    wanted = [Image.open(alone / f"00000-{seed}.png").tobytes() for seed in range(args.requests)]
    equal = sum(map(bytes.__eq__, found, wanted))
    print(
        f"requests: {len(found)} answered, {equal} equal, a node killed;"
        f" {restarts:.0f} image(s) generated again"
    )
    return args.requests - equal


def measure_speed(cluster: Cluster, folder: Path, alone: float, args: argparse.Namespace) -> None:
    print(f"speed: {alone:.1f} images per second without Ray, one thread")
    cluster.kill()
    for workers, added in ((1, 0), (2, 1), (4, 2)):
        for _ in range(added):
            cluster.add()
        started = time.monotonic()
        speed = generate(folder / str(workers), args, "--ray", cluster.address)
        seconds = time.monotonic() - started
        more = 1000 * (workers / speed - 1 / alone)
        print(
            f"speed: {speed:.1f} with {workers} workers, {more:.0f} ms more for each image"
            f" ({seconds:.0f} s with starting up)"
        )


if __name__ == "__main__":
    main()
