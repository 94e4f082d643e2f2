"""Ours against the published pipeline and against diffusers' Z-Image transformer: the same random
weights, prompt and noise.

    python benchmarks/speed.py --folder /tmp/l2p --published T2I-L2P
        (a narrower network, 256 pixels)
    python benchmarks/speed.py --folder /tmp/l2p --published T2I-L2P \\
        --scale full --size 1024 --device cuda (13 GB of disk)

Each program draws one image in a process of its own, one after another, in rounds. An evaluation
is one pass through the model, the median of the image's; an image includes the encoding of its
prompts, by the bundled small model's text encoder; "start to file" runs from the start of the
process until the image is saved. Against diffusers it is the transformer alone, in three passes.
Private memory is the process's anonymous pages (RssAnon), polled; weights that stay in the
memory-mapped file are not counted."""

import argparse
import json
import math
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from torch import Tensor, nn

BUNDLED_MODEL = Path(__file__).parents[1] / "l2p_core/shapes/model"
PROMPT = "a large red circle on a blue background, left"
CAPTION_WIDTH = 96  # the bundled text encoder's
# Width and main layers; heads of 128 and the decoder are the published ones.
SCALES = {"small": (384, 4), "quarter": (1024, 8), "wide": (3840, 1), "full": (3840, 30)}
INT8 = "ours, INT8"
# Each with what it is held against. ab2 draws as benchmarks/solvers.py has it: 18 steps for 30, at
# shift 2, come as near.
SIDES = {
    "published": "published",
    "ours": "published",
    "ours, ab2": "published",
    INT8: "published",
    "diffusers, transformer": "diffusers, transformer",
    "ours, transformer": "diffusers, transformer",
}
TOLERANCE = {
    "float32": 1e-5,
    "bfloat16": 0.03,
}  # of the first evaluation, root mean square against root mean square
INT8_TOLERANCE = 0.1  # and INT8 is compared in bfloat16 alone


def make(path: Path, scale: str) -> None:
    """Write a checkpoint of random weights that keep numbers at their size, in bfloat16."""
    from comfyui_l2p.l2p_core.config import L2PConfig
    from comfyui_l2p.l2p_core.files.load import expected_shapes
    from safetensors.torch import save_file

    dim, layers = SCALES[scale]
    config = L2PConfig(
        dim=dim,
        n_heads=dim // 128,
        n_layers=layers,
        ffn_dim=int(dim / 3 * 8),
        cap_feat_dim=CAPTION_WIDTH,
    )
    torch.manual_seed(0)
    save_file(
        {
            name: (
                (
                    torch.randn(shape) * (0.1 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5)
                    + ("norm" in name or name == "cap_embedder.0.weight")
                ).bfloat16()
            )
            for name, shape in expected_shapes(config).items()
        },
        path,
    )


def now(args: argparse.Namespace) -> float:
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.processor_time else time.perf_counter()


def watch(model: nn.Module, args: argparse.Namespace) -> tuple[list[float], list[Tensor]]:
    """Seconds of each call from now on, and what the first gives. Ours takes both evaluations of a
    guided step in one."""
    seconds, first = [], []

    def before(*_) -> None:
        seconds.append(-now(args))

    def after(_, __, output) -> None:
        seconds[-1] += now(args)
        first.extend([] if first else [output[0] if isinstance(output, list) else output])

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after)
    return seconds, first


def int8_of(checkpoint: Path) -> Path:
    return checkpoint.with_stem(f"{checkpoint.stem}-int8")


def ours(
    args: argparse.Namespace, sampler: str = "euler", int8: bool = False
) -> tuple[list[float], float, Tensor]:
    from comfyui_l2p.l2p_core import L2PPipeline

    pipe = L2PPipeline.from_pretrained(
        int8_of(args.checkpoint) if int8 else args.checkpoint,
        BUNDLED_MODEL / "text_encoder",
        device=args.device,
        torch_dtype=getattr(torch, args.dtype),
    )
    seconds, first = watch(pipe.transformer, args)
    pipe.text_encoder
    started = now(args)
    image = pipe(
        PROMPT,
        seed=0,
        height=args.size,
        width=args.size,
        sampler=sampler,
        **(
            {"num_inference_steps": args.steps}
            if sampler == "euler"
            else {"num_inference_steps": math.ceil(args.steps * 18 / 30), "shift": 2.0}
        ),
    )
    took = now(args) - started
    image.save(args.checkpoint.with_name("image.png"))
    return [each / 2 for each in seconds], took, first[0]


def published(args: argparse.Namespace) -> tuple[list[float], float, Tensor]:
    """Its own loader, models and pipeline. Two things are set: its text encoder's size, and, for
    float32, a time embedding without the cast to bfloat16 that its float32 model stops at."""
    import peft  # noqa: F401  (looks for torchvision, which may be absent)
    from transformers import AutoTokenizer, Qwen3Model

    sys.modules.setdefault(
        "torchvision", ModuleType("torchvision")
    )  # only its training data needs it
    sys.path.insert(0, str(args.published))
    from diffsynth.core.loader.model import load_model
    from diffsynth.models.z_image_dit_L2P import ZImageDiT
    from diffsynth.pipelines.z_image_L2P import ZImagePipeline

    dim, layers = SCALES[args.scale]
    dtype = getattr(torch, args.dtype)
    pipe = ZImagePipeline(args.device, dtype)
    pipe.dit = load_model(
        ZImageDiT,
        str(args.checkpoint),
        {
            "dim": dim,
            "n_heads": dim // 128,
            "n_kv_heads": dim // 128,
            "n_layers": layers,
            "cap_feat_dim": CAPTION_WIDTH,
        },
        dtype,
        args.device,
        use_disk_map=True,
    )
    pipe.text_encoder = (
        Qwen3Model.from_pretrained(
            BUNDLED_MODEL / "text_encoder", dtype=dtype, trust_remote_code=False
        )
        .to(args.device)
        .eval()
    )
    pipe.tokenizer = AutoTokenizer.from_pretrained(
        BUNDLED_MODEL / "tokenizer", trust_remote_code=False
    )
    pipe.tokenizer.chat_template = (
        "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant{{ '\\n' }}"
    )
    if dtype == torch.float32:
        embedder = pipe.dit.t_embedder
        embedder.forward = lambda t: embedder.mlp(
            embedder.timestep_embedding(t, embedder.frequency_embedding_size)
        )
    seconds, first = watch(pipe.dit, args)
    started = now(args)
    image = pipe(
        PROMPT,
        seed=0,
        height=args.size,
        width=args.size,
        num_inference_steps=args.steps,
        cfg_scale=2.0,
    )
    took = now(args) - started
    image.save(args.checkpoint.with_name("image.png"))
    return seconds, took, first[0][0][0].transpose(0, 1)


def inputs(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Image, time and caption."""
    generator, dtype = torch.Generator().manual_seed(0), getattr(torch, args.dtype)
    image, caption = (
        torch.randn(shape, generator=generator).to(args.device, dtype)
        for shape in ((1, 3, args.size, args.size), (30, CAPTION_WIDTH))
    )
    return image, torch.tensor([0.5], device=args.device), caption


@torch.no_grad()
def our_transformer(args: argparse.Namespace) -> tuple[list[float], None, Tensor]:
    from comfyui_l2p.l2p_core import load_model

    model = load_model(args.checkpoint, args.device, getattr(torch, args.dtype))
    model.local_decoder = None
    model.forward = model.features
    seconds, first = watch(model, args)
    image, t, caption = inputs(args)
    for _ in range(3):
        model(image, t, [caption])
    return seconds, None, first[0].flatten(2).transpose(1, 2)


@torch.no_grad()
def diffusers_transformer(args: argparse.Namespace) -> tuple[list[float], None, Tensor]:
    """With its last layer, one narrow linear, which a latent model has in the decoder's place."""
    from diffusers import ZImageTransformer2DModel
    from safetensors.torch import load_file

    dim, layers = SCALES[args.scale]
    dtype = getattr(torch, args.dtype)
    with torch.device("meta"):
        model = ZImageTransformer2DModel(
            all_patch_size=(16,),
            in_channels=3,
            dim=dim,
            n_heads=dim // 128,
            n_kv_heads=dim // 128,
            n_layers=layers,
            cap_feat_dim=CAPTION_WIDTH,
        ).eval()
    weights = {
        name: tensor.to(args.device, dtype)
        for name, tensor in load_file(args.checkpoint).items()
        if not name.startswith("local_decoder.")
    }
    weights |= {
        name: torch.zeros(tensor.shape, dtype=dtype, device=args.device)
        for name, tensor in model.state_dict().items()
        if name.startswith("all_final_layer.")
    }
    model.load_state_dict(weights, assign=True)
    seconds, _ = watch(model, args)
    image, t, caption = inputs(args)
    features = []
    model.all_final_layer["16-1"].register_forward_pre_hook(
        lambda _, given: features.append(given[0])
    )
    for _ in range(3):
        model([image.transpose(0, 1)], t, [caption], patch_size=16)
    return seconds, None, features[0][:, : (args.size // 16) ** 2]


RUNS = {
    "published": published,
    "ours": ours,
    "ours, ab2": partial(ours, sampler="ab2"),
    INT8: partial(ours, int8=True),
    "diffusers, transformer": diffusers_transformer,
    "ours, transformer": our_transformer,
}


def measure(args: argparse.Namespace) -> None:
    """Run one program in this process and print what it took, as JSON."""
    if args.processor_time:
        torch.set_num_threads(1)
    seconds, image, first = RUNS[args.side](args)
    saved = time.process_time() if args.processor_time else time.time() - args.started
    torch.save(first.float().cpu().clone(), args.checkpoint.with_name(f"{args.side}.pt"))
    print(
        json.dumps(
            {
                "evaluation": median(seconds),
                "image": image,
                "saved": saved,
                "memory": torch.cuda.max_memory_allocated() if args.device == "cuda" else 0,
            }
        )
    )


def run(side: str, dtype: str, args: argparse.Namespace) -> dict[str, float]:
    from load import private_bytes

    peak = 0
    process = subprocess.Popen(
        [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--side",
            side,
            "--dtype",
            dtype,
            "--started",
            str(time.time()),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(
            f"{side} ended with status {process.returncode}; to see why: --side {side!r} --dtype"
            f" {dtype}"
        )
    result = json.loads(process.stdout.read().splitlines()[-1])
    return {
        "evaluation": result["evaluation"],
        "image": result["image"],
        "start to file": result["image"] and result["saved"],
        "memory": (result["memory"] or peak) / 1e9,
    }


def difference(side: str, args: argparse.Namespace) -> float:
    """Of the first evaluation, against the program that it is held against."""
    one, other = (
        torch.load(args.checkpoint.with_name(f"{name}.pt")) for name in (side, SIDES[side])
    )
    return float((one - other).square().mean().sqrt() / other.square().mean().sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the checkpoint is made, and kept"
    )
    parser.add_argument(
        "--published",
        type=Path,
        metavar="CHECKOUT",
        help="of T2I-L2P, with what it requires installed",
    )
    parser.add_argument("--scale", choices=SCALES, default="quarter")
    parser.add_argument("--size", type=int, default=256, help="side in pixels, a multiple of 128")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dtype", choices=TOLERANCE, help="default: one after the other")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--programs", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="one thread, and the seconds it computes: for a machine that others use too",
    )
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.checkpoint = args.folder / f"{args.scale}.safetensors"
    if args.side:
        return measure(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.checkpoint.exists():
        make(args.checkpoint, args.scale)
    chosen = [
        side
        for side in SIDES
        if side in args.programs and (args.published or SIDES[side] != "published")
    ]
    if missing := {SIDES[side] for side in chosen} - set(chosen):
        parser.error(f"it takes {', '.join(missing)} to compare with")
    if INT8 in chosen and not int8_of(args.checkpoint).exists():
        from comfyui_l2p.quant.quantize import quantize

        quantize(args.checkpoint, int8_of(args.checkpoint))
    columns = ("evaluation", "image", "start to file", "memory")
    threads = (
        "processor time of 1 thread"
        if args.processor_time
        else f"{torch.get_num_threads()} threads"
    )
    print(
        f"{args.scale}, {args.size} pixels, {args.steps} steps, {args.device}, {threads}\n"
        f"| dtype | program | {' | '.join(columns)} | difference |\n"
        + "|---" * (3 + len(columns))
        + "|",
        flush=True,
    )
    for dtype in [args.dtype] if args.dtype else TOLERANCE:
        sides = [side for side in chosen if side != INT8 or dtype == "bfloat16"]
        results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                results[side].append(run(side, dtype, args))
        for side in sides:
            apart = difference(side, args)
            assert apart < (INT8_TOLERANCE if side == INT8 else TOLERANCE[dtype]), (
                f"{side} and {SIDES[side]} differ by {apart:.1e} in {dtype}: not the same work"
            )
            cells = []
            for column in columns:
                if results[side][0][column] is None:
                    cells.append("")
                    continue
                here, there = (
                    median(each[column] for each in results[name]) for name in (side, SIDES[side])
                )
                ratio = (
                    ""
                    if side == SIDES[side]
                    else (
                        f" ({here / there:.2f} of it)"
                        if column == "memory"
                        else f" ({there / here:.2f} x)"
                    )
                )
                cells.append(f"{here:.2f} {'GB' if column == 'memory' else 's'}{ratio}")
            print(
                f"| {dtype} | {side} | {' | '.join(cells)} |"
                f" {'' if side == SIDES[side] else f'{apart:.0e}'} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
