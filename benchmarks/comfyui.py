"""Two checkouts of the pack in one ComfyUI: time of a pass, memory at load, and memory of a pass of
65,536 tokens.

    git worktree add /tmp/before COMMIT
    python benchmarks/comfyui.py --before /tmp/before [--rounds 5]

Random weights of 1024 numbers wide with 8 layers and the published decoder, 512 x 512 pixels, on
the CPU, in FP32 with published names and in INT8 with packed ones. Each round runs both, each in a
process of its own, and the ratio is the median over rounds of after / before. Memory at load is
the peak of private memory (RssAnon) while loading, beside what the process had before. The large
pass is counted on tensors that have only a shape, at the published widths in bfloat16. ComfyUI is
found as by the tests: $COMFYUI_PATH, or ~/comfy/ComfyUI."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
SIZE = 512
PASSES = 5


def child(pack: str, file: str) -> None:
    """Measure one checkout, inside ComfyUI's Python; prints one JSON line."""
    import asyncio
    import importlib
    import os
    import threading
    import time

    answers, sys.stdout = sys.stdout, sys.stderr
    root = os.environ["COMFYUI_ROOT"]
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, root)
    import comfy.options

    comfy.options.enable_args_parsing()
    import app.frontend_management  # noqa: F401
    import comfy.ldm.lumina.model
    import comfy.ldm.modules.attention
    import comfy.model_management
    import comfy.ops
    import comfy.sd
    import torch

    import nodes

    torch.manual_seed(0)
    assert asyncio.run(nodes.load_custom_node(pack)), "the pack failed to import"
    package = nodes.NODE_CLASS_MAPPINGS["L2PKSampler"].__module__.removesuffix(".nodes.sample")
    module = importlib.import_module(f"{package}.nodes.comfy_model")
    config_module = importlib.import_module(f"{package}.l2p_core.config")
    meter = importlib.import_module(f"{package}.l2p_core.meter")

    def private() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    before, peaks, done = private(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(private() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = comfy.sd.load_diffusion_model(file)
    done.set()
    watcher.join()
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    network = model.model.diffusion_model
    image, sigma = torch.randn(1, 3, SIZE, SIZE), torch.tensor([0.5])
    prompt = torch.randn(1, 64, 2560)
    seconds = []
    with torch.inference_mode():
        for _ in range(PASSES + 1):
            begin = time.perf_counter()
            network(image, sigma, prompt, 64, transformer_options={})
            seconds.append(time.perf_counter() - begin)

    def no_scores(q, *_, **__):
        return torch.empty_like(q).movedim(1, 2).flatten(2)

    for place in (comfy.ldm.lumina.model, comfy.ldm.modules.attention):
        place.optimized_attention_masked = no_scores
    config = config_module.L2PConfig(n_layers=1, n_refiner_layers=1)
    with torch.device("meta"), torch.no_grad():
        large = (getattr(module, "L2PNetwork", None) or module.NextDiTL2P)(
            config, dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init, device="meta"
        )
        image = torch.empty(1, 3, 4096, 4096, dtype=torch.bfloat16)
        prompt = torch.empty(1, 100, 2560, dtype=torch.bfloat16)
        peak, _ = meter.peak_bytes(
            lambda: large(image, torch.ones(1), prompt, 100, transformer_options={})
        )
    print(
        json.dumps({"seconds": min(seconds[1:]), "loaded": max(peaks), "peak": peak}), file=answers
    )


def write_model(path: Path, quantized: bool) -> None:
    """Random weights: FP32 under the published names, INT8 under ComfyUI's, q, k and v packed."""
    sys.path[:0] = [str(ROOT / "tests")]
    import torch
    from comfyui_l2p.l2p_core.config import L2PConfig
    from comfyui_l2p.l2p_core.model import L2PTransformer
    from helpers import comfyui_naming, int8
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = L2PTransformer(
        L2PConfig(dim=1024, n_heads=8, n_layers=8, ffn_dim=2728 // 8 * 8)
    ).state_dict()
    tensors = int8(comfyui_naming(weights), "model.diffusion_model.")[0] if quantized else weights
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def main() -> None:
    """Run both checkouts in turn and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--before", type=Path, required=True, metavar="FOLDER", help="the other checkout"
    )
    parser.add_argument("--rounds", type=int, default=5, help="pairs to run (default 5)")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / "tests")]
    import real_comfyui

    found = real_comfyui.find()
    if isinstance(found, str):
        sys.exit(found)
    root, python = found
    print(
        "| weights | time, after / before | peak at load, GB | pass of 65,536 tokens, GB"
        " |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name, quantized in (("FP32", False), ("INT8", True)):
            write_model(file := Path(folder) / f"{name}.safetensors", quantized)
            results = {"before": [], "after": []}
            for _ in range(args.rounds):
                for side, pack in (("before", args.before), ("after", ROOT)):
                    command = [python, __file__, "--child", pack.resolve(), file]
                    run = subprocess.run(
                        command,
                        env={"COMFYUI_ROOT": str(root), "PATH": "/usr/bin:/bin"},
                        cwd=folder,
                        capture_output=True,
                        text=True,
                    )
                    if run.returncode:
                        sys.exit(run.stderr[-3000:])
                    results[side].append(json.loads(run.stdout.strip().splitlines()[-1]))
            ratios = [
                after["seconds"] / before["seconds"]
                for before, after in zip(results["before"], results["after"])
            ]
            loaded, peak = (
                [median(each[key] for each in results[side]) / 1e9 for side in ("before", "after")]
                for key in ("loaded", "peak")
            )
            print(
                f"| {name} | {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
                f" {loaded[0]:.2f} → {loaded[1]:.2f} | {peak[0]:.2f} → {peak[1]:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
    else:
        main()
