"""How much memory and time it takes to load a full-size checkpoint, against reading its file once.

    python benchmarks/load.py --folder /tmp/l2p (27 GB of disk, 14 GB of memory, some minutes)

Makes two files with random weights, under the names, shapes and dtypes of the real ones:
model-1k-merge (19.57 GB, main layers 5..24 in FP32) and its INT8 form (7.2 GB: ComfyUI's naming,
packed q, k and v, the linears of layers 1..29 in INT8). Each is loaded to bfloat16 in a process of
its own. Private memory is the process's anonymous pages (RssAnon), polled; pages of the
memory-mapped file are the kernel's to drop and are not counted."""

import argparse
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from comfyui_l2p.l2p_core import L2PConfig, load_model
from comfyui_l2p.l2p_core.files.load import expected_shapes
from comfyui_l2p.l2p_core.files.quantization import Int8Linear

BYTES = {"F32": 4, "BF16": 2, "I8": 1}
POOL = 1 << 24  # random numbers drawn once; every tensor is a run of them


def published_tensors(layers: int = 30) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of model-1k-merge, or of its first main layers."""
    for name, shape in expected_shapes(L2PConfig(n_layers=layers)).items():
        layer = re.match(r"layers\.(\d+)\.", name)
        yield name, "F32" if layer and 5 <= int(layer[1]) <= 24 else "BF16", shape


def int8_tensors(layers: int = 30) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of an INT8 repack in ComfyUI's naming."""
    for name, shape in expected_shapes(L2PConfig(n_layers=layers)).items():
        if "to_k" in name or "to_v" in name:
            continue
        if "to_q" in name:
            name, shape = name.replace("to_q", "qkv"), (3 * shape[0], shape[1])
        name = (
            name.replace("to_out.0", "out")
            .replace("norm_q", "q_norm")
            .replace("norm_k", "k_norm")
            .replace("all_x_embedder.16-1", "x_embedder")
        )
        quantized = re.match(r"layers\.(?!0\.).*(attention|feed_forward)", name) and len(shape) == 2
        yield f"model.diffusion_model.{name}", "I8" if quantized else "BF16", shape
        if quantized:
            yield f"model.diffusion_model.{name}_scale", "F32", (shape[0], 1)


def encoded_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """Return the beginning of a safetensors file of these tensors, and the bytes that follow it."""
    header, offset = {}, 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, offset


def make(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    """Write a safetensors file of random weights, a block of rows at a time: normal, standard
    deviation about 0.02, with outliers as trained models have them: one value in 1000 up to 30
    times that (SqueezeLLM, arXiv 2306.07629), the input channels' scales spread by a third, and one
    in 1000 of them 20 times the others (LLM.int8(), arXiv 2208.07339)."""
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(POOL, dtype=np.float32) * 0.02
    pool[rng.random(POOL) < 0.001] *= 10
    pool, codes = torch.from_numpy(pool), rng.integers(-127, 128, POOL, dtype=np.int8)
    head, _ = encoded_header(tensors)
    with path.open("wb") as stream:
        stream.write(head)
        for _, dtype, shape in tensors:
            rows, channels = (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
            scales = np.exp(rng.normal(0, 0.33, channels)) * np.where(
                rng.random(channels) < 0.001, 20, 1
            )
            scales = (
                torch.from_numpy(scales.astype(np.float32)) if rows > 1 else torch.ones(channels)
            )
            while rows:
                count = min(rows, max(1, (1 << 20) // channels))
                start, rows = int(rng.integers(0, POOL - count * channels)), rows - count
                if dtype == "I8":
                    stream.write(codes[start : start + count * channels])
                    continue
                block = pool[start : start + count * channels].view(count, channels) * scales
                stream.write(
                    (block if dtype == "F32" else block.bfloat16().view(torch.int16)).numpy()
                )


def drop_from_cache(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(path: Path) -> float:
    """Seconds to read the file from disk."""
    drop_from_cache(path)
    started = time.perf_counter()
    with path.open("rb", buffering=0) as stream:
        while stream.read(1 << 24):
            pass
    return time.perf_counter() - started


def private_bytes(process: int | str = "self") -> int:
    """0 of a process that has just ended."""
    try:
        return (
            int(re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())[1])
            * 1024
        )
    except (OSError, TypeError):
        return 0


def measure(path: Path) -> None:
    """Load the file in this process and print what it took, as JSON."""
    drop_from_cache(path)
    peak, done = [private_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=watch)
    before = private_bytes()
    watcher.start()
    started, computed = time.perf_counter(), time.process_time()
    model = load_model(path, dtype=torch.bfloat16)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - computed
    done.set()
    watcher.join()
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    print(
        json.dumps(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "peak_private_gb": peak[0] / 1e9,
                "before_gb": before / 1e9,
                "weights_gb": weights / 1e9,
                "parameters": sum(
                    tensor.numel()
                    for name, tensor in model.state_dict().items()
                    if not name.endswith("weight_scale")
                ),
                "int8_layers": sum(isinstance(module, Int8Linear) for module in model.modules()),
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the two files are made, and kept")
    parser.add_argument("--layers", type=int, default=30, help="main layers (default: 30)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure)
    if not args.folder:
        parser.error("give a --folder with 27 GB of room")
    args.folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in (
        ("model-1k-merge", list(published_tensors(args.layers))),
        ("model-1k-int8", list(int8_tensors(args.layers))),
    ):
        path = args.folder / f"{name}.safetensors"
        if not path.exists():
            make(path, tensors)
        reading = read_once(path)
        result = json.loads(
            subprocess.run(
                [sys.executable, __file__, "--measure", path],
                check=True,
                text=True,
                stdout=subprocess.PIPE,
            ).stdout
        )
        print(
            f"{name}: {path.stat().st_size / 1e9:.2f} GB, {result['parameters']:,} parameters,"
            f" {result['int8_layers']} INT8 layers; weights {result['weights_gb']:.2f} GB, peak"
            f" private memory {result['peak_private_gb']:.2f} GB, of which"
            f" {result['before_gb']:.2f} before loading; {result['cpu_seconds']:.1f} s of CPU time,"
            f" {result['seconds']:.1f} s,"
            f" {result['seconds'] / reading:.2f} x reading the file once ({reading:.1f} s)"
        )


if __name__ == "__main__":
    main()
