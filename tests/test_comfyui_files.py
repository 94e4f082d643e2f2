"""The file tools on the canvas: what they write is what the command line writes, and it is there to
load at once."""

import hashlib

import pytest
import torch
from comfyui_l2p.l2p_core.files.layout import read_layout
from comfyui_l2p.quant.quantize import Options, quantize
from real_comfyui import Rejected
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(comfyui_server, tiny_weights):
    """ComfyUI's folder of diffusion models, with a whole model and the two files it is merged
    from."""
    folder = comfyui_server.models / "diffusion_models"
    save_file(tiny_weights, folder / "whole.safetensors")
    save_file(
        {name: tensor + 1 for name, tensor in tiny_weights.items() if name.startswith("layers.0.")},
        folder / "part.safetensors",
    )
    yield folder
    for file in folder.glob("*.safetensors"):
        file.unlink()


def node(kind: str, **inputs) -> dict:
    return {"node": {"class_type": kind, "inputs": {"filename": "", "overwrite": False, **inputs}}}


def numbers(path):
    layout = read_layout(path)
    with path.open("rb") as stream:

        def digest(entry):
            stream.seek(entry.begin)
            return hashlib.sha256(stream.read(entry.end - entry.begin)).hexdigest()

        return {key: digest(entry) for key, entry in layout.entries.items()}


@pytest.mark.parametrize(
    "kind, granularity",
    [("int8_tensorwise", "row"), ("int8_tensorwise", "convrot"), ("float8_e4m3fn", "row")],
)
def test_quantize_writes_what_the_library_writes(
    comfyui_server, folder, tmp_path, kind, granularity
):
    request = node(
        "L2PQuantizeCheckpoint",
        checkpoint="whole.safetensors",
        format=kind,
        granularity=granularity,
        preset="small",
        filename="small",
    )
    try:
        entry = comfyui_server.wait(comfyui_server.queue(request))
    except Rejected as rejected:  # a comfy-kitchen of before it could write INT8 by rows
        assert "installed comfy-kitchen is too old" in str(rejected)
        assert not (folder / "small.safetensors").exists()
        pytest.skip("this ComfyUI's comfy-kitchen can't quantize to that")
    assert "signal to noise" in entry["outputs"]["node"]["text"][0]
    quantize(
        folder / "whole.safetensors",
        tmp_path / "ours.safetensors",
        Options(kind, "tensor" if kind == "float8_e4m3fn" else granularity, "small"),
    )
    assert numbers(folder / "small.safetensors") == numbers(tmp_path / "ours.safetensors")
    listed = comfyui_server.get("/object_info/L2PCheckpointLoader")["L2PCheckpointLoader"]["input"][
        "required"
    ]["checkpoint"]
    assert "small.safetensors" in str(listed)


def test_merge_and_convert(comfyui_server, folder, tiny_weights):
    comfyui_server.wait(
        comfyui_server.queue(
            node(
                "L2PMergeCheckpoint",
                trained="part.safetensors",
                base="whole.safetensors",
                dtype="as they are",
            )
        )
    )
    merged = numbers(folder / "part-merged.safetensors")
    assert (
        merged["layers.0.attention.to_q.weight"]
        == numbers(folder / "part.safetensors")["layers.0.attention.to_q.weight"]
    )
    assert (
        merged["layers.1.attention.to_q.weight"]
        == numbers(folder / "whole.safetensors")["layers.1.attention.to_q.weight"]
    )
    comfyui_server.wait(
        comfyui_server.queue(
            node("L2PConvertCheckpoint", checkpoint="whole.safetensors", patch="64", seed=3)
        )
    )
    assert read_layout(folder / "whole-l2p-patch64.safetensors").config.patch_size == 64


def test_merge_adds_a_lora_of_comfyuis_folder(comfyui_server, folder, tiny_weights, tmp_path):
    weight = tiny_weights["layers.0.attention.to_q.weight"]
    lora = {
        "layers.0.attention.to_q.lora_A.weight": torch.ones(2, weight.shape[1]),
        "layers.0.attention.to_q.lora_B.weight": torch.ones(len(weight), 2),
    }
    save_file(lora, comfyui_server.models / "loras" / "ones.safetensors")
    comfyui_server.wait(
        comfyui_server.queue(
            node(
                "L2PMergeCheckpoint",
                trained="ones.safetensors",
                base="whole.safetensors",
                dtype="as they are",
                strength=0.5,
            )
        )
    )
    merged = load_file(folder / "ones-merged.safetensors")["layers.0.attention.to_q.weight"]
    assert torch.equal(merged, (weight.float() + 0.5 * 2).to(weight.dtype))


@pytest.mark.parametrize(
    "filename", ["../escaped", "sub/name", "/tmp/name", "..\\name", "C:name", ".hidden"]
)
def test_names_that_leave_the_folder_are_rejected(comfyui_server, folder, filename):
    before = sorted(comfyui_server.base.rglob("*.safetensors"))
    with pytest.raises(Rejected, match="expected a plain name"):
        comfyui_server.run(
            node(
                "L2PConvertCheckpoint",
                checkpoint="whole.safetensors",
                patch="64",
                seed=0,
                filename=filename,
            )
        )
    assert sorted(comfyui_server.base.rglob("*.safetensors")) == before


def test_a_file_that_is_there_is_kept(comfyui_server, folder):
    before = (folder / "part.safetensors").read_bytes()
    request = node(
        "L2PConvertCheckpoint", checkpoint="whole.safetensors", patch="64", seed=0, filename="part"
    )
    with pytest.raises(Rejected, match="already.*overwrite"):
        comfyui_server.run(request)
    assert (folder / "part.safetensors").read_bytes() == before
    request["node"]["inputs"]["overwrite"] = True
    comfyui_server.wait(comfyui_server.queue(request))
    assert read_layout(folder / "part.safetensors").config.patch_size == 64


def test_no_file_hides_another_of_its_name(comfyui_server, folder, tiny_weights):
    there = comfyui_server.models / "checkpoints" / "elsewhere.safetensors"
    save_file(tiny_weights, there)
    with pytest.raises(Rejected, match="has that name"):
        comfyui_server.run(
            node(
                "L2PConvertCheckpoint",
                checkpoint="whole.safetensors",
                patch="64",
                seed=0,
                filename="elsewhere",
            )
        )
    assert not (folder / "elsewhere.safetensors").exists()
    there.unlink()


def test_stop_leaves_nothing_behind(comfyui, tiny_weights, tmp_path):
    save_file(tiny_weights, tmp_path / "whole.safetensors")
    with pytest.raises(Rejected, match="InterruptProcessingException"):
        comfyui.call("quantize_while_stopping", path=tmp_path / "whole.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["whole.safetensors"]
