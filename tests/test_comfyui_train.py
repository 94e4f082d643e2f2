"""Training from the canvas, on a real server: what the nodes show and leave is that of `l2p
train`, and nothing that a graph says reaches outside ComfyUI's folders."""

import json
import re
import struct
from io import BytesIO
from pathlib import Path

import pytest
import torch
from comfyui_l2p.l2p_core.files.layout import read_layout
from comfyui_l2p.l2p_core.train.run import train
from helpers import apart
from PIL import Image
from real_comfyui import Rejected
from safetensors.torch import load_file, save_file
from small_runs import CHECKPOINT, config, losses, make_data
from workflow_variants import BUNDLED, PROMPT

RUNS = "output/l2p_training"
FROM_GRAPH = "images of the graph"
TEXT_EVENT, PREVIEW_EVENT = 3, 1  # of ComfyUI's binary messages


@pytest.fixture(scope="module")
def server(comfyui_server):
    """With a folder of six images to train on, `shapes`."""
    make_data(comfyui_server.base / "input" / "shapes", seeds=False)
    return comfyui_server


def lora_node(**inputs) -> dict:
    """L2P Train LoRA on the bundled model."""
    return {
        "class_type": "L2PTrainLoRA",
        "inputs": {
            "checkpoint": BUNDLED,
            "text_encoder": BUNDLED,
            "dataset": "shapes",
            "output": "canvas",
            "preset": "16gb",
            "steps": 500,
            "lora_rank": 4,
            "learning_rate": 1e-3,
            "batch": 2,
            "trigger": "",
            "sample_prompts": PROMPT,
            "sample_every": 1000,
            "seed": 0,
            **inputs,
        },
    }


def whole_node(**inputs) -> dict:
    """L2P Train on the bundled model."""
    node = lora_node(preset="24gb", layers="shallow", sample_every=0, **inputs)
    del node["inputs"]["lora_rank"]
    return {**node, "class_type": "L2PTrain"}


def image_with(loader: dict) -> dict:
    """A graph's nodes that generate an image of 32 x 32 in one step, by the MODEL of `loader`."""
    return {
        "loader": loader,
        "clip": {
            "class_type": "L2PTextEncoderLoader",
            "inputs": {"text_encoder": BUNDLED, "device": "default"},
        },
        "prompt": {
            "class_type": "L2PTextEncode",
            "inputs": {"clip": ["clip", 0], "prompt": PROMPT, "negative_prompt": ""},
        },
        "sampler": {
            "class_type": "L2PKSampler",
            "inputs": {
                "model": ["loader", 0],
                "positive": ["prompt", 0],
                "negative": ["prompt", 1],
                "width": 32,
                "height": 32,
                "batch_size": 1,
                "seed": 1,
                "steps": 1,
                "cfg": 1.0,
                "sampler_name": "euler",
                "scheduler": "l2p",
                "shift": 3.0,
                "denoise": 1.0,
            },
        },
        "image": {
            "class_type": "SaveImage",
            "inputs": {"images": ["sampler", 0], "filename_prefix": "trained"},
        },
    }


def checkpoint_loader(name: str | list) -> dict:
    return {
        "class_type": "L2PCheckpointLoader",
        "inputs": {"checkpoint": name, "weight_dtype": "automatic", "convrot": "as marked"},
    }


def run_until(server, graph: dict, step: int) -> tuple[list[str], list[bytes]]:
    """Run a graph as the page does, and press Stop at this progress. Returns the texts and the
    previews that the page was sent."""
    websocket = pytest.importorskip("websocket")
    page = websocket.create_connection(f"ws{server.url[4:]}/ws?clientId=page", timeout=300)
    server.post("/prompt", {"prompt": graph, "client_id": "page"})
    texts, previews, stopped = [], [], False
    while True:
        message = page.recv()
        if isinstance(message, bytes):
            (kind,) = struct.unpack(">I", message[:4])
            (skip,) = struct.unpack(">I", message[4:8])
            if kind == TEXT_EVENT:
                texts.append(message[8 + skip :].decode())
            elif kind == PREVIEW_EVENT:
                previews.append(message[8:])
            continue
        event = json.loads(message)
        if event["type"] == "progress" and event["data"]["value"] >= step and not stopped:
            assert event["data"]["max"] == graph["train"]["inputs"]["steps"]
            server.post("/interrupt", {})
            stopped = True
        if event["type"].startswith("execution_") and event["type"] != "execution_start":
            if event["type"] != "execution_cached":
                page.close()
                assert event["type"] == "execution_interrupted", event
                return texts, previews


@pytest.mark.slow
def test_stop_saves_and_the_next_run_resumes_to_a_lora_that_loads(server, tmp_path):
    texts, previews = run_until(server, {"train": lora_node()}, step=1)
    assert any(text.endswith(": 100 %") for text in texts)  # of what comes before the first step
    assert any(re.match(r"step \d+ of 500, loss ", text) for text in texts)
    assert texts[-2] == "stopping: the run is saved"
    with Image.open(BytesIO(previews[-1])) as preview:  # a square sample, and the curve, 2 : 1
        assert preview.format == "JPEG" and preview.height == preview.width * 1.5
    (stopped,) = (server.models / "loras").glob("canvas-step*.safetensors")
    step = int(stopped.stem.removeprefix("canvas-step"))
    assert step >= 1 and texts[-1] == f"{stopped.name} is in models/loras"

    graph = {
        "train": lora_node(steps=step + 2),
        "base": checkpoint_loader(BUNDLED),
        **image_with(
            {
                "class_type": "LoraLoaderModelOnly",
                "inputs": {
                    "model": ["base", 0],
                    "lora_name": ["train", 0],
                    "strength_model": 30.0,
                },
            }
        ),
        "loss": {"class_type": "PreviewImage", "inputs": {"images": ["train", 2]}},
    }
    shown, image, loss = server.run(graph)
    (plain,) = server.run(image_with(checkpoint_loader(BUNDLED)))
    assert apart(Image.open(BytesIO(image)), Image.open(BytesIO(plain))) > 8
    assert Image.open(BytesIO(shown)).size == (768, 768 + 384)
    assert Image.open(BytesIO(loss)).size == (800, 400)

    name = f"canvas-step{step + 2}.safetensors"
    run = server.base / RUNS / "canvas"
    assert load_file(server.models / "loras" / name).keys() == load_file(stopped).keys()
    listed = server.get("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]["input"]
    assert name in listed["required"]["lora_name"][0]
    assert "lora key not loaded" not in server.log.read_text()

    # the same run by the library alone: cosine hardly falls in the first steps of 500
    settings = {"lora_rank": 4, "schedule": "constant", "steps": step, "freeze": "5:-5"}
    train(config(server.base / "input/shapes", output=str(tmp_path), **settings), progress=False)
    logged = losses(run)
    assert [number for number, _ in logged] == list(range(1, step + 3))
    for (_, there), (_, here) in zip(logged, losses(tmp_path)):
        assert there == pytest.approx(here, rel=1e-3)


@pytest.mark.slow
def test_the_trained_model_is_there_to_load(server):
    graph = {
        "left": {
            "class_type": "EmptyImage",
            "inputs": {"width": 48, "height": 32, "batch_size": 2, "color": 0xFF0000},
        },
        "captions": {
            "class_type": "L2PPromptList",
            "inputs": {"prompts": "a red image\n\nanother red image"},
        },
        "train": whole_node(
            dataset=FROM_GRAPH,
            images=["left", 0],
            prompts=["captions", 0],
            output="whole",
            steps=1,
        ),
        **image_with(checkpoint_loader(["train", 0])),
    }
    server.run(graph)
    layout = read_layout(server.models / "diffusion_models" / "whole-step1.safetensors")
    assert layout.kind == "model"
    before, after = load_file(CHECKPOINT), load_file(layout.files[0])
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name].float(), after[name].float()) for name in before)
    (folder,) = (server.base / RUNS / "whole").glob("dataset-*")
    assert sorted(file.name for file in folder.iterdir()) == [
        "00001.png",
        "00002.png",
        "metadata.csv",
    ]
    assert Image.open(folder / "00002.png").getpixel((0, 0)) == (255, 0, 0)
    assert (folder / "metadata.csv").read_text().splitlines()[2] == "00002.png,another red image"


def of_graph(**inputs) -> dict:
    """What trains on two images of the graph."""
    return {
        "images": {
            "class_type": "EmptyImage",
            "inputs": {"width": 32, "height": 32, "batch_size": 2, "color": 0},
        },
        "train": lora_node(dataset=FROM_GRAPH, images=["images", 0], **inputs),
    }


def lines(text: str) -> dict:
    return {"class_type": "PrimitiveStringMultiline", "inputs": {"value": text}}


@pytest.mark.parametrize(
    "graph, message",
    [
        ({"train": lora_node(output="../out")}, "expected a plain name"),
        ({"train": lora_node(output="/tmp/out")}, "expected a plain name"),
        ({"train": lora_node(output=" ")}, "expected a plain name"),
        ({"train": whole_node(output="..\\out")}, "expected a plain name"),
        ({"train": lora_node(dataset="../..")}, "not_in_list"),
        ({"train": lora_node(dataset="names")}, r"names \.\./private\.png, which is not in"),
        ({"train": lora_node(dataset=FROM_GRAPH)}, "nothing to train on"),
        (of_graph(), "2 images and 0 prompts"),
        (of_graph(prompts=["p", 0]) | {"p": lines("a\nb\nc")}, "2 images and 3 prompts"),
        (of_graph() | {"train": lora_node(images=["images", 0])}, "images are connected"),
        ({"train": lora_node(output="taken")}, "taken-step9.safetensors is in .* already"),
    ],
)
def test_bad_input_is_rejected_and_nothing_is_written(server, graph, message):
    folder = server.base / "input" / "names"
    folder.mkdir(exist_ok=True)
    (folder / "metadata.csv").write_text("file_name,text\n../private.png,mine\n")
    Image.new("RGB", (32, 32)).save(folder.parent / "private.png")
    save_file({"x": torch.zeros(1)}, server.models / "loras" / "taken-step9.safetensors")
    before = files_below(server.base)
    with pytest.raises(Rejected, match=message):
        server.wait(server.queue(graph))
    assert files_below(server.base) == before


def files_below(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and "custom_nodes" not in file.parts and "user" not in file.parts
    )


@pytest.mark.parametrize(
    "settings, there, missing",
    [
        ({"lora_rank": 4}, ["accelerate", "peft"], None),
        ({"lora_rank": 4}, [], "accelerate and peft"),
        ({"freeze": ""}, [], "accelerate"),
        ({"lora_rank": 4, "quantize_frozen": "nf4"}, ["accelerate", "peft"], "bitsandbytes"),
    ],
)
def test_missing_packages_are_named_with_the_command(comfyui, settings, there, missing):
    said = comfyui.call("missing_packages", settings=settings, there=there)
    if missing is None:
        assert said is None
    else:
        assert f"needs {missing}, which" in said
        assert said.endswith(f"-m pip install {missing.replace(' and', '')}")
