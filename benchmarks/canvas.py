"""The tables of docs/comfyui.md: what ComfyUI's own nodes, samplers and schedulers do with L2P.

    python benchmarks/canvas.py nodes        (3 minutes on two CPU cores)
    python benchmarks/canvas.py samplers     (half an hour)

Writes each table between its markers in docs/comfyui.md. Images are 96 x 96, by the bundled small
model in float32 at seed 7 and cfg 2; those of nodes take 10 steps where the table says no other
number. A difference is the mean over all pixels, in levels of 255. ComfyUI is found as by the
tests: $COMFYUI_PATH, or ~/comfy/ComfyUI."""

import argparse
import copy
import io
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "comfyui.md"
sys.path.insert(0, str(ROOT / "tests"))

import real_comfyui  # noqa: E402

BUNDLED = "L2P shapes (bundled small model)"
PROMPT = "a large red circle on a blue background, left"
FILE = "shapes.safetensors"
STEPS = 10
NEAR = "as near to the reference as euler (lms and ipndm_v need more than 8 steps)"
SAME = 0.5  # levels: what rounding to 8 bits changes


def node(class_type: str, **inputs: object) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def own() -> dict:
    """L2P KSampler alone."""
    return {
        "model": node(
            "L2PCheckpointLoader", checkpoint=BUNDLED, weight_dtype="float32", convrot="as marked"
        ),
        "clip": node("L2PTextEncoderLoader", text_encoder=BUNDLED, device="default"),
        "prompt": node("L2PTextEncode", clip=["clip", 0], prompt=PROMPT, negative_prompt=""),
        "sampler": node(
            "L2PKSampler",
            model=["model", 0],
            positive=["prompt", 0],
            negative=["prompt", 1],
            **{"width": 96, "height": 96, "batch_size": 1, "seed": 7, "steps": STEPS, "cfg": 2.0},
            **{"sampler_name": "euler", "scheduler": "l2p", "shift": 3.0, "denoise": 1.0},
        ),
        "save": node("SaveImage", images=["sampler", 0], filename_prefix="canvas"),
    }


def core() -> dict:
    """SamplerCustom with L2P Scheduler, on a pixel latent."""
    graph = own()
    graph["empty"] = node("EmptyL2PLatentImage", size="custom", width=96, height=96, batch_size=1)
    graph["sigmas"] = node("L2PScheduler", steps=STEPS, shift=3.0, denoise=1.0)
    graph["euler"] = node("KSamplerSelect", sampler_name="euler")
    graph["sampler"] = node(
        "SamplerCustom",
        model=["model", 0],
        add_noise=True,
        noise_seed=7,
        cfg=2.0,
        positive=["prompt", 0],
        negative=["prompt", 1],
        sampler=["euler", 0],
        sigmas=["sigmas", 0],
        latent_image=["empty", 0],
    )
    graph["decode"] = node("L2PLatentToImage", latent=["sampler", 0])
    graph["save"]["inputs"]["images"] = ["decode", 0]
    return graph


def ksampler(steps: int = STEPS, scheduler: str = "simple", denoise: float = 1.0) -> dict:
    graph = core()
    inputs = graph["sampler"]["inputs"]
    graph["sampler"] = node(
        "KSampler",
        **{key: inputs[key] for key in ("model", "positive", "negative", "latent_image", "cfg")},
        **{"seed": 7, "steps": steps, "sampler_name": "euler"},
        **{"scheduler": scheduler, "denoise": denoise},
    )
    return graph


def between(graph: dict, socket: str, class_type: str, slot: int = 0, **inputs: object) -> dict:
    """That graph with a node before an input of its sampler. inputs: SELF stands for what the input
    was connected to."""
    graph = copy.deepcopy(graph)
    before = graph["sampler"]["inputs"][socket]
    inputs = {key: before if value == "SELF" else value for key, value in inputs.items()}
    name = f"before {socket}"
    graph[name] = node(class_type, **inputs)
    graph["sampler"]["inputs"][socket] = [name, slot]
    return graph


def on_model(graph: dict, class_type: str, **inputs: object) -> dict:
    return between(graph, "model", class_type, model="SELF", **inputs)


def loaded_by(class_type: str, **inputs: object) -> dict:
    graph = own()
    graph["model"] = node(class_type, **inputs)
    return graph


def decoded_by(class_type: str, vae: dict, **inputs: object) -> dict:
    graph = core()
    graph["vae"] = vae
    graph["decode"] = node(class_type, samples=["sampler", 0], vae=["vae", 0], **inputs)
    return graph


def from_image(class_type: str, image: str) -> dict:
    """Image to image by KSampler, with the image encoded by that node."""
    graph = ksampler(denoise=0.5)
    graph["image"] = node("LoadImage", image=image)
    if class_type == "VAEEncode":
        graph["vae"] = node("VAELoader", vae_name="pixel_space")
        graph["empty"] = node(class_type, pixels=["image", 0], vae=["vae", 0])
    else:
        graph["empty"] = node(class_type, image=["image", 0])
    return graph


def advanced() -> dict:
    graph = core()
    inputs = graph["sampler"]["inputs"]
    graph["noise"] = node("RandomNoise", noise_seed=7)
    graph["guider"] = node(
        "CFGGuider", cfg=2.0, **{key: inputs[key] for key in ("model", "positive", "negative")}
    )
    graph["sampler"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        **{key: inputs[key] for key in ("sampler", "sigmas", "latent_image")},
    )
    return graph


def encoded() -> dict:
    graph = own()
    graph["positive"] = node("CLIPTextEncode", clip=["clip", 0], text=PROMPT)
    graph["negative"] = node("CLIPTextEncode", clip=["clip", 0], text="")
    graph["sampler"]["inputs"].update(positive=["positive", 0], negative=["negative", 0])
    return graph


def masked(image: str, graph: dict | None = None) -> dict:
    """Inpainting by KSampler of the right half."""
    graph = graph or from_image("L2PImageToLatent", image)
    graph["sampler"]["inputs"]["denoise"] = 1.0
    graph["half"] = node("SolidMask", value=1.0, width=48, height=96)
    graph["none"] = node("SolidMask", value=0.0, width=96, height=96)
    graph["mask"] = node(
        "MaskComposite",
        **{"destination": ["none", 0], "source": ["half", 0], "x": 48, "y": 0, "operation": "add"},
    )
    return between(graph, "latent_image", "SetLatentNoiseMask", samples="SELF", mask=["mask", 0])


def latent_after(class_type: str, **inputs: object) -> dict:
    """An image whose latent passes through that node."""
    graph = core()
    graph["after"] = node(class_type, samples=["sampler", 0], **inputs)
    graph["decode"]["inputs"]["latent"] = ["after", 0]
    return graph


def pasted(class_type: str) -> dict:
    """A white square of 32 pixels, pasted at 32, 32."""
    graph = core()
    graph["white"] = node("EmptyImage", width=32, height=32, batch_size=1, color=0xFFFFFF)
    graph["patch"] = node("L2PImageToLatent", image=["white", 0])
    square = {"x": 32, "y": 32}
    if class_type == "LatentComposite":
        graph["after"] = node(
            class_type, samples_to=["sampler", 0], samples_from=["patch", 0], feather=0, **square
        )
    else:
        graph["after"] = node(
            class_type,
            destination=["sampler", 0],
            source=["patch", 0],
            resize_source=False,
            **square,
        )
    graph["decode"]["inputs"]["latent"] = ["after", 0]
    return graph


def empty_by(class_type: str, sampler: dict | None = None) -> dict:
    graph = sampler or core()
    graph["empty"] = node(class_type, width=96, height=96, batch_size=1)
    return graph


CACHE = {"reuse_threshold": 0.05, "start_percent": 0.15, "end_percent": 0.95, "verbose": False}
AREA = {"width": 96, "height": 96, "x": 0, "y": 0, "strength": 1.0}
SHARE = {"width": 1.0, "height": 1.0, "x": 0.0, "y": 0.0, "strength": 1.0}
NO_PLAIN = "no"  # nothing to compare the image with


def cases(image: str) -> list[tuple]:
    """(node, remarks, graph, the graph it is compared with)."""
    plain, custom, classic = own(), core(), ksampler()
    redrawn = from_image("L2PImageToLatent", image)
    pixel_vae = node("VAELoader", vae_name="pixel_space")
    tiles = {"tile_size": 64, "overlap": 16, "temporal_size": 64, "temporal_overlap": 8}
    return [
        (
            "Load Checkpoint",
            "INT8 files too; no shards. Its VAE output passes pixels through. Its CLIP output"
            " is empty, because an L2P file holds no text encoder",
            loaded_by("CheckpointLoaderSimple", ckpt_name=FILE),
            plain,
        ),
        (
            "Load Diffusion Model",
            "INT8 files too; no shards",
            loaded_by("UNETLoader", unet_name=FILE, weight_dtype="default"),
            plain,
        ),
        (
            "CLIP Text Encode",
            "use one for each prompt; it does not cut at 512 tokens",
            encoded(),
            plain,
        ),
        ("SamplerCustom", "with L2P Scheduler", custom, plain),
        ("SamplerCustomAdvanced", "with L2P Scheduler", advanced(), plain),
        (
            "KSampler, 20 steps",
            "with scheduler `simple`",
            ksampler(20),
            changed(plain, steps=20),
        ),
        (
            "KSampler, 30 steps",
            "with scheduler `simple`, which is near the published schedule",
            ksampler(30),
            changed(plain, steps=30),
        ),
        ("Empty Latent Image", "", empty_by("EmptyLatentImage", ksampler()), classic),
        ("EmptySD3LatentImage", "", empty_by("EmptySD3LatentImage", ksampler()), classic),
        (
            "VAE Decode",
            "with the VAE `pixel_space` or that of Load Checkpoint; computes in bfloat16 on"
            " some GPUs",
            decoded_by("VAEDecode", pixel_vae),
            custom,
        ),
        (
            "VAE Decode (Tiled)",
            "as VAE Decode",
            decoded_by("VAEDecodeTiled", pixel_vae, **tiles),
            custom,
        ),
        ("VAE Encode", "as VAE Decode", from_image("VAEEncode", image), redrawn),
        (
            "Set Latent Noise Mask",
            "inpainting; the difference is to the image without a mask",
            masked(image),
            changed(redrawn, denoise=1.0),
        ),
        (
            "Differential Diffusion",
            "a soft mask; the difference is to Set Latent Noise Mask alone",
            on_model(masked(image), "DifferentialDiffusion"),
            masked(image),
        ),
        (
            "Upscale Latent By",
            "use a second pass after it",
            latent_after("LatentUpscaleBy", upscale_method="bilinear", scale_by=2.0),
            NO_PLAIN,
        ),
        (
            "EasyCache",
            "the difference depends on its threshold, here 0.05",
            on_model(plain, "EasyCache", **CACHE),
            plain,
        ),
        (
            "LazyCache",
            "the difference depends on its threshold, here 0.05",
            on_model(plain, "LazyCache", **CACHE),
            plain,
        ),
        (
            "ScaleROPE",
            "scales and shifts the positions of rows and columns; here it scales by 1.1",
            on_model(
                plain,
                "ScaleROPE",
                **{"scale_x": 1.1, "scale_y": 1.1, "scale_t": 1.0},
                **{"shift_x": 0.0, "shift_y": 0.0, "shift_t": 0.0},
            ),
            plain,
        ),
        (
            "SkipLayerGuidanceDiT",
            "has no effect",
            on_model(
                plain,
                "SkipLayerGuidanceDiT",
                **{"double_layers": "1", "single_layers": "1", "scale": 3.0},
                **{"start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0.0},
            ),
            plain,
        ),
        (
            "ModelSamplingAuraFlow",
            "L2P KSampler uses its own `shift`, and says so if that of this node differs",
            on_model(plain, "ModelSamplingAuraFlow", shift=5.0),
            plain,
        ),
        (
            "ModelSamplingSD3",
            "do not use it: it scales the timestep differently",
            on_model(plain, "ModelSamplingSD3", shift=3.0),
            plain,
        ),
        (
            "ModelSamplingSD3 before KSampler",
            "do not use it: it distorts the image",
            on_model(classic, "ModelSamplingSD3", shift=3.0),
            classic,
        ),
        (
            "Conditioning Zero Out",
            "do not use it as the negative: L2P expects an encoded empty prompt there. With the"
            " bundled model the difference is small; published models were not tested",
            between(plain, "negative", "ConditioningZeroOut", conditioning="SELF"),
            plain,
        ),
        (
            "ReferenceLatent",
            "",
            between(
                core(), "positive", "ReferenceLatent", conditioning="SELF", latent=["empty", 0]
            ),
            custom,
        ),
        (
            "Conditioning (Set Area)",
            "here the area is the whole image; areas count in pixels, in every sampler and stage",
            between(plain, "positive", "ConditioningSetArea", conditioning="SELF", **AREA),
            plain,
        ),
        (
            "Conditioning (Set Area with Percentage)",
            "",
            between(
                plain, "positive", "ConditioningSetAreaPercentage", conditioning="SELF", **SHARE
            ),
            plain,
        ),
        (
            "Upscale Latent to 192 x 192",
            "expects latents of an eighth of the image's side. Use Upscale Image between L2P"
            " Pixel Latent to Image and L2P Image to Pixel Latent",
            latent_after(
                "LatentUpscale",
                **{"upscale_method": "bilinear", "width": 192, "height": 192, "crop": "disabled"},
            ),
            NO_PLAIN,
        ),
        (
            "Crop Latent to 64 x 64",
            "expects latents of an eighth of the image's side. Use Image Crop",
            latent_after("LatentCrop", width=64, height=64, x=0, y=0),
            NO_PLAIN,
        ),
        (
            "Latent Composite at 32, 32",
            "expects latents of an eighth of the image's side. Use Image Composite Masked",
            pasted("LatentComposite"),
            NO_PLAIN,
        ),
        (
            "LatentCompositeMasked at 32, 32",
            "expects latents of an eighth of the image's side. Use Image Composite Masked; only"
            " 0, 0 is right",
            pasted("LatentCompositeMasked"),
            NO_PLAIN,
        ),
        (
            "Empty Flux 2 Latent",
            "use Empty L2P Latent Image",
            empty_by("EmptyFlux2LatentImage"),
            NO_PLAIN,
        ),
        (
            "Empty HunyuanImage Latent",
            "use Empty L2P Latent Image",
            empty_by("EmptyHunyuanImageLatent"),
            NO_PLAIN,
        ),
    ]


def changed(graph: dict, **inputs: object) -> dict:
    graph = copy.deepcopy(graph)
    graph["sampler"]["inputs"].update(inputs)
    return graph


def pixels(server: real_comfyui.Server, graph: dict) -> np.ndarray:
    (file,) = server.run(graph)
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def measured(
    server: real_comfyui.Server, name: str, graph: dict, plain: dict | str, known: dict
) -> str:
    """What comes of a graph, in words. known: images of graphs that it is compared with."""
    try:
        found = pixels(server, graph)
    except real_comfyui.Rejected as rejected:
        return f"fails: {str(rejected).strip().rpartition(': ')[2].partition('. ')[0].rstrip('.')}"
    height, width = found.shape[:2]
    if " at 32, 32" in name:
        rows, columns = np.where((found > 250).all(axis=2))
        return f"pasted at {columns.min()}, {rows.min()}"
    if plain == NO_PLAIN:
        return f"{width} x {height}"
    if (key := json.dumps(plain)) not in known:
        known[key] = pixels(server, plain)
    difference = np.abs(found - known[key]).mean()
    return "the same image" if difference < SAME else f"differs by {difference:.1f} levels"


def measure_nodes() -> str:
    with tempfile.TemporaryDirectory() as folder:
        server = real_comfyui.Server(*real_comfyui.find(), Path(folder))
        try:
            bundled = (BUNDLED_MODEL / "transformer.safetensors").read_bytes()
            for place in ("checkpoints", "diffusion_models"):
                (server.models / place / FILE).write_bytes(bundled)
            (start,) = server.run(changed(own(), seed=3))
            image = server.upload("start.png", start)
            known: dict[str, np.ndarray] = {}
            rows = ["| node | measured | remarks |", "|---|---|---|"]
            for name, text, graph, plain in cases(image):
                rows.append(f"| {name} | {measured(server, name, graph, plain, known)} | {text} |")
                print(rows[-1], flush=True)
        finally:
            server.close()
    return "\n".join(rows)


def measure_samplers() -> str:
    with tempfile.TemporaryDirectory() as folder:
        worker = real_comfyui.Worker(*real_comfyui.find(), Path(folder))
        try:
            samplers, schedulers = worker.call("choices")
            unusable, grainy = worker.call("warned_samplers")

            def draw(sampler: str, steps: int, scheduler: str = "l2p") -> np.ndarray | None:
                file = Path(folder) / "latent.safetensors"
                try:
                    worker.call(
                        "draw_by",
                        sampler_name=sampler,
                        scheduler=scheduler,
                        steps=steps,
                        output=file,
                    )
                except real_comfyui.Rejected:
                    return None
                return load_file(file)["samples"].numpy().clip(-1, 1)

            exact = draw("euler", 100)

            def distance(*how: object) -> float:
                found = draw(*how)
                return np.inf if found is None else float(np.abs(found - exact).mean() * 127.5)

            errors = {}
            for name in [*samplers, "ab2"]:
                errors[name] = (distance(name, 20), distance(name, 30))
                print(name, *errors[name], flush=True)
            of_schedulers = {
                name: (distance("euler", 20, name), distance("euler", 30, name))
                for name in ("l2p", *schedulers)
            }
        finally:
            worker.close()
    near = 1.1 * errors["euler"][1]
    groups = {NEAR: [], "usable": []}
    groups |= {"leaves noise; the node says so": [], "distorted; the node says so": []}
    for name, (_, at_30) in errors.items():
        if name in unusable or name in grainy:
            group = "distorted" if name in unusable else "leaves noise"
            groups[f"{group}; the node says so"].append(name)
        else:
            groups[NEAR if at_30 <= near else "usable"].append(name)
    rows = ["| sampler | 20 steps | 30 steps | verdict |", "|---|---|---|---|"]
    rows += [
        f"| {', '.join(names)} | {spans(errors, names)} | {text} |"
        for text, names in groups.items()
    ]
    rows += ["", "| scheduler, with euler | 20 steps | 30 steps |", "|---|---|---|"]
    rows += [
        f"| {name} | {spans(of_schedulers, [name])} |"
        for name in sorted(of_schedulers, key=lambda name: of_schedulers[name][1])
    ]
    return "\n".join(rows)


def spans(errors: dict[str, tuple], names: list[str]) -> str:
    """The differences of these, least to largest, in a column for each number of steps."""
    columns = []
    for place in (0, 1):
        each = sorted((f"{errors[name][place]:.1f}" for name in names), key=float)
        columns.append(each[0] if each[0] == each[-1] else f"{each[0]} to {each[-1]}")
    return " | ".join(columns)


def write(name: str, made: str) -> None:
    """Put a table between its markers in the docs."""
    start, end = f"<!-- python benchmarks/canvas.py {name} -->", f"<!-- end of {name} -->"
    page = DOCS.read_text(encoding="utf-8")
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    assert pattern.search(page), f"{DOCS.name} has no markers of {name}"
    DOCS.write_text(pattern.sub(lambda _: f"{start}\n{made}\n{end}", page), encoding="utf-8")


TABLES = {"nodes": measure_nodes, "samplers": measure_samplers}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    chosen = parser.parse_args().table
    if isinstance(found := real_comfyui.find(), str):
        sys.exit(found)
    write(chosen, TABLES[chosen]())
