"""Load `l2p serve` with many clients, kill its workers, and send it broken requests.

    python benchmarks/serve.py          (a quarter of an hour on two busy CPU cores)

Two workers on the CPU, the bundled model, three parts:

    load      Every request is answered; memory; how far the order of answers differs from the order
              of requests. Then the same while a worker is killed every few seconds: every image
              equals that of the first time.
    damaged   Every broken request is answered with a 4xx.
    overhead  An image by HTTP against the same image in this process, in turns.

It exits with 1 where anything was lost. For Linux."""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from comfyui_l2p.l2p_core import L2PPipeline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from serving import Server, damaged_requests, image_of, serving

PARTS = ("load", "damaged", "overhead")
PROMPT = "a large red circle on a blue background"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=PARTS, help="default: all")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="of each image (default 4)")
    parser.add_argument("--kill-every", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--damaged", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)

    with serving("--workers", "2", "--max-upload-mb", "1") as server:
        server.generate(prompt=PROMPT, num_inference_steps=1)  # workers are warm
        lost = 0
        if "load" in args.parts:
            lost += measure_load(server, args)
        if "damaged" in args.parts:
            lost += count_damaged(server, args.damaged)
        if "overhead" in args.parts:
            measure_overhead(server)
    sys.exit(int(lost > 0))


class Load:
    """Clients that each ask for one image after another; image number N has seed N.

    images: seed → pixels. asked, answered: seed → time. failures: messages."""

    def __init__(self, server: Server, args: argparse.Namespace):
        self.server, self.args = server, args
        self.images: dict[int, bytes] = {}
        self.asked: dict[int, float] = {}
        self.answered: dict[int, float] = {}
        self.failures: list[str] = []
        self._seeds = iter(range(args.requests))
        self._lock = threading.Lock()

    def run(self) -> float:
        """Send all requests; returns seconds."""
        started = time.monotonic()
        clients = [threading.Thread(target=self._client) for _ in range(self.args.clients)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        return time.monotonic() - started

    def _client(self) -> None:
        while True:
            with self._lock:
                seed = next(self._seeds, None)
            if seed is None:
                return
            self.asked[seed] = time.monotonic()
            try:
                answer = self.server.generate(
                    prompt=PROMPT, seed=seed, num_inference_steps=self.args.steps
                )
            except (AssertionError, OSError) as error:
                self.failures.append(str(error))
                continue
            self.answered[seed] = time.monotonic()
            self.images[seed] = image_of(answer["data"][0]["b64_json"]).tobytes()

    def overtaken(self) -> int:
        """The most requests that were sent after one and answered before it."""
        return max(
            sum(
                self.asked[other] > self.asked[seed] and self.answered[other] < self.answered[seed]
                for other in self.answered
            )
            for seed in self.answered
        )


def measure_load(server: Server, args: argparse.Namespace) -> int:
    """Print how the load went, without kills and with them; returns how many images were lost."""
    before = memory(server)
    load = Load(server, args)
    seconds = load.run()
    print(f"load: {len(load.images)} of {args.requests} answered in {seconds:.0f} s")
    print(f"  most later requests that were answered before an earlier one: {load.overtaken()}")
    print(f"  memory in MB, server and workers: {before} before, {memory(server)} after")
    lost = args.requests - len(load.images)
    return lost + measure_kills(server, args, load.images)


def measure_kills(server: Server, args: argparse.Namespace, wanted: dict[int, bytes]) -> int:
    """Print how the load went with workers killed; returns how many images were lost or differ."""
    load, done, kills = Load(server, args), threading.Event(), 0

    def kill() -> None:
        nonlocal kills
        while not done.wait(args.kill_every):
            if server.metric("l2p_workers_available") == 2:  # the last one is up again
                os.kill(random.choice(server.workers()), signal.SIGKILL)
                kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    seconds = load.run()
    done.set()
    killer.join()
    equal = sum(load.images.get(seed) == pixels for seed, pixels in wanted.items())
    print(f"kills: {len(load.images)} of {args.requests} answered in {seconds:.0f} s")
    print(f"  {kills} workers killed, {server.metric('l2p_worker_restarts_total'):.0f} restarts")
    print(f"  {equal} images equal to those without kills; failures: {load.failures}")
    return args.requests - equal


def count_damaged(server: Server, count: int) -> int:
    """Print the status of each broken request; returns how many were not 4xx."""
    found: Counter[int] = Counter()
    for path, body, kind in damaged_requests(count):
        status, _, answer = server.ask(path, body, content_type=kind)
        assert json.loads(answer)["error"]["message"]
        found[status] += 1
    healthy = json.loads(server.ask("/health")[2])["status"]
    print(f"damaged: {dict(found)} for {count} requests; health afterwards: {healthy}")
    return sum(number for status, number in found.items() if not 400 <= status < 500)


def measure_overhead(server: Server, count: int = 100) -> None:
    """Print what HTTP, the queue, the other process and the PNG add to an image of one step, in
    time on a processor: other programs on the machine don't disturb that."""
    pipe = L2PPipeline.from_pretrained(device="cpu", torch_dtype=None)
    direct, served = [], []  # seconds
    for seed in range(count + 1):
        started = time.process_time()
        pipe(PROMPT, seed=seed, num_inference_steps=1)
        direct.append(time.process_time() - started)
        started = processor_seconds(server)
        server.generate(prompt=PROMPT, seed=seed, num_inference_steps=1)
        served.append(processor_seconds(server) - started)
    before, after = (1000 * sum(each[1:]) / count for each in (direct, served))
    print(
        f"overhead: {after - before:.0f} ms of processor time an image"
        f" ({before:.0f} ms in this process, {after:.0f} ms in server and workers)"
    )


def processor_seconds(server: Server) -> float:
    """Processor time that the server and its workers used so far."""

    def used(process: int) -> int:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # utime, stime: proc_pid_stat(5)

    ticks = sum(used(process) for process in (server.process.pid, *server.workers()))
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(server: Server) -> list[int]:
    """Resident memory of the server and its workers, in MB."""

    def resident(process: int) -> int:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)

    return [resident(process) for process in (server.process.pid, *server.workers())]


if __name__ == "__main__":
    main()
