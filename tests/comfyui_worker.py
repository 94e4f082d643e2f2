"""Runs inside ComfyUI's own Python: one JSON call a line in, one JSON answer a line out. Tensors travel as files.

`real_comfyui.Worker` is the other end. Nothing here asserts; the tests compare what comes back."""
import asyncio
import importlib
import json
import sys
import traceback

answers, sys.stdout = sys.stdout, sys.stderr  # ComfyUI prints, which is not an answer
root, pack = sys.argv[1:3]
sys.argv[1:] = ["--cpu", *sys.argv[3:]]
sys.path.insert(0, root)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.lora  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import nodes  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def import_pack() -> list[str]:
    """Import the pack as ComfyUI does, and name the nodes that came."""
    before = set(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(pack)), "the pack failed to import"
    return sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)


def of_pack(module: str):
    """A module of the pack, as ComfyUI imported it."""
    package = nodes.NODE_CLASS_MAPPINGS["L2PKSampler"].__module__.removesuffix(".nodes.sample")
    return importlib.import_module(f"{package}.{module}")


def describe(names: list[str]) -> dict[str, list]:
    """What the interface is told of these nodes: their label, whether each input has a tooltip, and the outputs' names."""
    infos = {name: nodes.NODE_CLASS_MAPPINGS[name].GET_NODE_INFO_V1() for name in names}
    return {name: [info["display_name"],
                   {key: bool(options[1].get("tooltip")) for group in ("required", "optional")
                    for key, options in info["input"].get(group, {}).items()},
                   list(info["output_name"])] for name, info in infos.items()}


def load(path: str, loader: str, **options):
    if loader == "checkpoint":
        return comfy.sd.load_checkpoint_guess_config(path, output_clip=False)[:3]
    if loader == "diffusion":
        return comfy.sd.load_diffusion_model(path), None, None
    folder, _, name = path.rpartition("/")
    folder_paths.add_model_folder_path("diffusion_models", folder, is_default=True)
    folder_paths.filename_list_cache.clear()
    return nodes.NODE_CLASS_MAPPINGS["L2PCheckpointLoader"].execute(name, **options)[0], None, None


def forward(path: str, loader: str, inputs: str, output: str, lora: str | None = None, strength: float = 1.0, **options) -> dict:
    """The network's output, noise - picture, and what was loaded."""
    model, _, vae = load(path, loader, **options)
    if lora:
        model, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(lora), strength, 0)
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    tensors = load_file(inputs)
    with torch.no_grad():
        out = model.model.diffusion_model(tensors["image"], tensors["sigma"], tensors["caption"], tensors["caption"].shape[1],
                                          transformer_options={})
    save_file({"output": out.float().contiguous()}, output)
    return {"class": type(model.model).__name__, "patches": len(model.patches), "vae": vae is not None,
            "formats": sorted({str(getattr(module.weight, "layout_cls", None) or module.weight.dtype)
                               for module in model.model.diffusion_model.modules() if hasattr(module, "weight")})}


def vae_round_trip(path: str) -> float:
    """The largest change of a picture that went through Load Checkpoint's VAE and back."""
    vae = load(path, "checkpoint")[2]
    picture = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    return float((vae.decode(vae.encode(picture)) - picture).abs().max())


def save_and_reload(path: str, inputs: str, output: str) -> dict:
    """Save Checkpoint, then forward with what was saved."""
    model, _, vae = load(path, "checkpoint")
    saved = output + ".saved.safetensors"
    comfy.sd.save_checkpoint(saved, model, vae=vae)
    return forward(saved, "checkpoint", inputs, output)


def detect(shapes: dict[str, list[int]], prefix: str = "") -> str | None:
    """Which model ComfyUI takes these for."""
    with torch.device("meta"):
        config = comfy.model_detection.model_config_from_unet({key: torch.empty(shape) for key, shape in shapes.items()}, prefix)
    return config and type(config).__name__


def encode(prompt: str, output: str, text_encoder: str) -> list[int]:
    clip = nodes.NODE_CLASS_MAPPINGS["L2PTextEncoderLoader"].execute(text_encoder)[0]
    positive, negative = nodes.NODE_CLASS_MAPPINGS["L2PTextEncode"].execute(clip, prompt, "").args
    save_file({"positive": positive[0][0].float().contiguous(), "negative": negative[0][0].float().contiguous()}, output)


def with_controlnet(path: str) -> None:
    """Sample under ComfyUI's Z-Image ControlNet, its weights aside."""
    from comfy_extras.nodes_model_patch import ZImageControlPatch
    model = load(path, "diffusion")[0].clone()
    patch = ZImageControlPatch.__new__(ZImageControlPatch)
    model.set_model_noise_refiner_patch(patch)
    model.set_model_double_block_patch(patch)
    model.model.diffusion_model(torch.zeros(1, 3, 32, 32), torch.ones(1), torch.zeros(1, 4, 64), 4,
                                transformer_options=model.model_options["transformer_options"])


def stop_inside_a_step(path: str) -> list[str]:
    """Which parts of the network had run when ComfyUI stopped, Stop being pressed in its first layer."""
    model = load(path, "diffusion")[0]
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    network, reached = model.model.diffusion_model, []
    for name in ("layers.0", "local_decoder"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: (
            reached.append(name), comfy.model_management.interrupt_current_processing(True)) and None)
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, 32, 32), torch.ones(1), torch.zeros(1, 4, 64), 4, transformer_options={})
    except comfy.model_management.InterruptProcessingException:
        return reached
    finally:
        comfy.model_management.interrupt_current_processing(False)
    raise RuntimeError("Stop was not noticed")


def quantize_while_stopping(path: str) -> None:
    """Quantize with Stop pressed when the progress bar first moves; later moves may be too close together to be shown."""
    folder, _, name = path.rpartition("/")
    folder_paths.add_model_folder_path("diffusion_models", folder, is_default=True)
    folder_paths.filename_list_cache.clear()

    def press_stop(*_, **__) -> None:
        comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(press_stop)
    try:
        nodes.NODE_CLASS_MAPPINGS["L2PQuantizeCheckpoint"].execute(name, "int8_tensorwise", "row", "small", "", False)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


def nodes_under(version: str) -> list[list[str]]:
    """(nodes that the pack gives a ComfyUI of that version, what it logs)."""
    import logging
    pack_module = of_pack("nodes")
    said, real, log = [], pack_module.comfyui_version, logging.error
    pack_module.comfyui_version, logging.error = version, said.append
    try:
        found = asyncio.run(pack_module.L2PExtension().get_node_list())
    finally:
        pack_module.comfyui_version, logging.error = real, log
    return [[node.__name__ for node in found], said]


def install_again() -> bool:
    """Whether a second import of the pack leaves ComfyUI as the first did."""
    before = comfy.model_detection.detect_unet_config, comfy.lora.model_lora_keys_unet, len(comfy.supported_models.models)
    asyncio.run(nodes.load_custom_node(pack))
    return before == (comfy.model_detection.detect_unet_config, comfy.lora.model_lora_keys_unet, len(comfy.supported_models.models))


def core_detection_tests() -> int | None:
    """Exit status of ComfyUI's own tests of model detection, None where it has no pytest."""
    try:
        import pytest
    except ImportError:
        return None
    return int(pytest.main(["-q", "-p", "no:cacheprovider", f"{root}/tests-unit/comfy_test/model_detection_test.py"]))


def memory(config: dict, size: int, dtype: str, batch: int = 1) -> list[int]:
    """(bytes ComfyUI is told a pass takes, bytes that are alive at its peak) for a model of the published widths, counted
    on tensors without contents."""
    import comfy.ldm.lumina.model
    import comfy.ops
    pack_module = of_pack("nodes.comfy_model")
    l2p_config = pack_module.L2PConfig(**config, decoder=of_pack("l2p_core.config").PUBLISHED_DECODERS[config["patch_size"]])
    dtype = getattr(torch, dtype)
    whole_scores = comfy.ldm.lumina.model.optimized_attention_masked
    comfy.ldm.lumina.model.optimized_attention_masked = lambda q, *_, **__: q.movedim(1, 2).flatten(2)  # none, as on a GPU
    with torch.device("meta"), torch.no_grad():
        network = pack_module.NextDiTL2P(l2p_config, dtype=dtype, operations=comfy.ops.disable_weight_init, device="meta")
        image, caption = torch.empty(batch, 3, size, size, dtype=dtype), torch.empty(batch, 100, l2p_config.cap_feat_dim, dtype=dtype)
        counted, _ = of_pack("l2p_core.meter").peak_bytes(lambda: network(image, torch.ones(batch), caption, 100, transformer_options={}))
    comfy.ldm.lumina.model.optimized_attention_masked = whole_scores
    model = pack_module.L2PModel.__new__(pack_module.L2PModel)
    torch.nn.Module.__init__(model)
    model.diffusion_model, model.get_dtype_inference = network, lambda: dtype
    return [int(model.memory_required([batch, 3, size, size])), counted]


def shortage(path: str, have: int, batch_size: int, **plan) -> str | None:
    """What the sampler says of that drawing on a device of so many bytes."""
    sampler = of_pack("nodes.sample")
    model = load(path, "diffusion")[0]
    _, _, trained = sampler.sizes_of(model)
    return sampler.shortage(model, sampler.plan_stages(steps=4, strength=1.0, stage_strength=0.2, trained=trained, multiple=16, **plan),
                            batch_size, have)


def largest_asked_for(path: str, size: int, **options) -> int:
    """The most bytes that ComfyUI makes room for at the least, as a picture of so many pixels is drawn."""
    model, conditioning, asked = load(path, "diffusion")[0], [[torch.zeros(1, 4, 96), {}]], []
    estimate = comfy.sampler_helpers.estimate_memory

    def recorded(*args):
        asked.append(estimate(*args))
        return asked[-1]
    comfy.sampler_helpers.estimate_memory = recorded
    try:
        nodes.NODE_CLASS_MAPPINGS["L2PKSampler"].execute(model, conditioning, conditioning, size, size, 1, 0, 2, 2.0, "euler", "l2p", 3.0, 1.0,
                                                         **options)
    finally:
        comfy.sampler_helpers.estimate_memory = estimate
    return int(max(least for _, least in asked))


def core_knows_l2p(detected: dict | str | None) -> bool:
    """What the pack makes of a ComfyUI that detects this in an L2P model, or fails with this message."""
    def detect(*_):
        if isinstance(detected, str):
            raise KeyError(detected)
        return detected
    before, comfy.model_detection.detect_unet_config = comfy.model_detection.detect_unet_config, detect
    try:
        return of_pack("nodes.comfy_model").core_knows_l2p()
    finally:
        comfy.model_detection.detect_unet_config = before


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": globals()[request["call"]](**request["arguments"])}
        except BaseException as error:  # ComfyUI's interrupt is a BaseException
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


main()
