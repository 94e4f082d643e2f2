"""Runs inside ComfyUI's own Python: one JSON call a line in, one JSON answer a line out. Tensors
travel as files.

`real_comfyui.Worker` is the other end. Nothing here asserts; the tests compare what comes back."""

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import json
import sys
import traceback

answers, sys.stdout = sys.stdout, sys.stderr  # ComfyUI prints, which is not an answer
root, pack = sys.argv[1:3]
sys.argv[1:] = ["--cpu", *sys.argv[3:]]
sys.path.insert(0, root)
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import app.frontend_management  # noqa: E402, F401 - as the server does: with core's packs its `utils` is hidden
import comfy.lora  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sampler_helpers  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes  # noqa: E402


def import_pack() -> list[str]:
    """Import the pack as ComfyUI does, and name the nodes that came."""
    before = set(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(pack)), "the pack failed to import"
    return sorted(set(nodes.NODE_CLASS_MAPPINGS) - before)


@contextlib.contextmanager
def listed(kind: str, path: str):
    """Within it ComfyUI lists the file of that path among its models of that kind; yields the name
    that it lists. A name without a folder stays."""
    folder, _, name = path.rpartition("/")
    if not folder:
        yield name
        return
    folder_paths.add_model_folder_path(kind, folder, is_default=True)
    folder_paths.filename_list_cache.clear()
    try:
        yield name
    finally:  # the test removes its folder
        folder_paths.folder_names_and_paths[kind][0].remove(folder)
        folder_paths.filename_list_cache.clear()


def of_pack(module: str):
    """A module of the pack, as ComfyUI imported it."""
    package = nodes.NODE_CLASS_MAPPINGS["L2PKSampler"].__module__.removesuffix(".nodes.sample")
    return importlib.import_module(f"{package}.{module}")


def describe(names: list[str]) -> dict[str, list]:
    """What the interface is told of these nodes: their label, whether each input has a tooltip, and
    the outputs' names."""
    infos = {name: nodes.NODE_CLASS_MAPPINGS[name].GET_NODE_INFO_V1() for name in names}
    return {
        name: [
            info["display_name"],
            {
                key: bool(options[1].get("tooltip"))
                for group in ("required", "optional")
                for key, options in info["input"].get(group, {}).items()
            },
            list(info["output_name"]),
        ]
        for name, info in infos.items()
    }


def load(path: str, loader: str, **options):
    if loader == "checkpoint":
        return comfy.sd.load_checkpoint_guess_config(path, output_clip=False)[:3]
    if loader == "diffusion":
        return comfy.sd.load_diffusion_model(path), None, None
    with listed("diffusion_models", path) as name:
        model = nodes.NODE_CLASS_MAPPINGS["L2PCheckpointLoader"].execute(name, **options)[0]
    return model, None, None


def forward(
    path: str,
    loader: str,
    inputs: str,
    output: str,
    lora: str | None = None,
    strength: float = 1.0,
    **options,
) -> dict:
    """The network's output, noise - image, and what was loaded."""
    model, _, vae = load(path, loader, **options)
    if lora:
        model, _ = comfy.sd.load_lora_for_models(
            model, None, comfy.utils.load_torch_file(lora), strength, 0
        )
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    tensors = load_file(inputs)
    with torch.no_grad():
        out = model.model.diffusion_model(
            tensors["image"],
            tensors["sigma"],
            tensors["caption"],
            tensors["caption"].shape[1],
            tensors.get("mask"),
            transformer_options={},
        )
    save_file({"output": out.float().contiguous()}, output)
    return {
        "class": type(model.model).__name__,
        "patches": len(model.patches),
        "shift": float(model.model.model_sampling.shift),
        "vae": vae is not None,
        "formats": sorted(
            {
                str(getattr(module.weight, "layout_cls", None) or module.weight.dtype)
                for module in model.model.diffusion_model.modules()
                if getattr(module, "weight", None) is not None
            }
        ),
    }


def forward_with(
    path: str,
    inputs: str,
    output: str,
    rope: dict | None = None,
    patches: dict | None = None,
    override: bool = False,
    wrapper: bool = False,
) -> dict:
    """The network's output with options that other nodes set, and what those nodes saw.

    rope: ComfyUI's rope_options. patches: name → how it changes a stack's tokens: "keep", "zero
    img" or "zero txt", after the last block. override: attention that returns v. wrapper: adds to
    the network's input in place."""
    model, tensors, seen = load(path, "diffusion")[0], load_file(inputs), []
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    network = model.model.diffusion_model

    def patch(action: str, last: int):
        def run(given: dict) -> dict:
            seen.append(
                [
                    given["block_index"],
                    list(given["img"].shape),
                    list(given["txt"].shape),
                    list(given["pe"].shape),
                ]
            )
            if action == "keep" or given["block_index"] < last:
                return {}
            part = action.removeprefix("zero ")
            return {part: torch.zeros_like(given[part])}

        return run

    def attend_to_itself(function, q, k, v, *args, **kwargs):
        seen.append(list(v.shape))
        return v.movedim(1, 2).flatten(2)

    def add_in_place(executor, x, *args, **kwargs):
        out = executor(x.clone(), *args, **kwargs)
        x += 1
        return out

    options = {"rope_options": rope} if rope else {}
    if patches:
        stacks = {"double_block": network.layers, "noise_refiner": network.noise_refiner}
        options["patches"] = {
            name: [patch(action, len(stacks[name]) - 1)] for name, action in patches.items()
        }
    if override:
        options["optimized_attention_override"] = attend_to_itself
    if wrapper:
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        comfy.patcher_extension.add_wrapper(kind, add_in_place, options)
    image = tensors["image"].clone()
    with torch.no_grad():
        out = network(image, tensors["sigma"], tensors["caption"], transformer_options=options)
    save_file({"output": out.contiguous()}, output)
    return {"seen": seen, "input_changed": not torch.equal(image, tensors["image"])}


def copied_at_load(path: str) -> int:
    """Bytes of the network's tensors that are not the file's own memory."""
    module = of_pack("nodes.comfy_model")
    state_dict = comfy.utils.load_torch_file(path)
    own = {tensor.untyped_storage().data_ptr() for tensor in state_dict.values()}
    out = module.published_state_dict(state_dict, module.layout_of(state_dict))
    return sum(
        tensor.nbytes for tensor in out.values() if tensor.untyped_storage().data_ptr() not in own
    )


def int8_products(path: str, inputs: str) -> dict:
    """How many INT8 products a pass takes, with q, k and v together and apart, and by how much the
    outputs differ."""
    model, tensors, private = (
        load(path, "diffusion")[0],
        load_file(inputs),
        of_pack("nodes.comfyui"),
    )
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    joint, found = private.joint_int8, {"together": 0}

    def counted(x, layers):
        out = joint(x, layers)
        found["together"] += out is not None
        return out

    def run():
        with torch.no_grad():
            return model.model.diffusion_model(
                tensors["image"], tensors["sigma"], tensors["caption"], transformer_options={}
            )

    private.joint_int8 = counted
    try:
        together = run()
        private.joint_int8 = lambda x, layers: None
        apart = run()
    finally:
        private.joint_int8 = joint
    return {**found, "difference": float((together - apart).abs().max())}


def saved_names(path: str, output: str, lora: str | None = None) -> list[str]:
    """The tensor names of what Save Checkpoint writes."""
    model, _, vae = load(path, "checkpoint")
    if lora:
        model, _ = comfy.sd.load_lora_for_models(
            model, None, comfy.utils.load_torch_file(lora), 1.0, 0
        )
    comfy.sd.save_checkpoint(output, model, vae=vae)
    return sorted(load_file(output))


def broken_self_test(path: str) -> list[str]:
    """What loading says, and what is logged, in a ComfyUI whose attention takes other arguments."""
    import logging

    import comfy.ldm.modules.attention as attention

    module, logged = of_pack("nodes.comfy_model"), []
    real, log = attention.optimized_attention_masked, logging.error
    attention.optimized_attention_masked, logging.error = lambda only_one: only_one, logged.append
    module.self_test.cache_clear()
    said = []
    try:
        for _ in range(2):
            try:
                load(path, "diffusion")
            except Exception as error:
                said.append(str(error))
    finally:
        attention.optimized_attention_masked, logging.error = real, log
        module.self_test.cache_clear()
    return [*said, *logged]


def broken_flux(path: str) -> list[str]:
    """What loading says, and what is logged, in a ComfyUI whose FLUX.2 takes other arguments."""
    import logging

    import comfy.ldm.flux.model as flux

    module, logged = of_pack("nodes.flux2"), []
    real, log = flux.Flux.forward_orig, logging.error
    flux.Flux.forward_orig, logging.error = lambda only_one: only_one, logged.append
    module.self_test.cache_clear()
    try:
        load(path, "diffusion")
    except Exception as error:
        return [str(error), *logged]
    finally:
        flux.Flux.forward_orig, logging.error = real, log
        module.self_test.cache_clear()
    return []


def self_test_time() -> float:
    """Seconds that the self-test takes, in CPU time."""
    import time

    module = of_pack("nodes.comfy_model")
    module.self_test.cache_clear()
    begin = time.process_time()
    assert module.self_test() is None
    return time.process_time() - begin


def not_recognised(path: str) -> None:
    """Load with our loader where another pack makes ComfyUI recognise nothing."""
    real = comfy.model_detection.model_config_from_unet
    comfy.model_detection.model_config_from_unet = lambda *_, **__: None
    try:
        load(path, "node")
    finally:
        comfy.model_detection.model_config_from_unet = real


def with_reference_image(path: str) -> None:
    """Sample with a conditioning that carries a reference image."""
    model = load(path, "diffusion")[0]
    conditioning = [[torch.zeros(1, 4, 64), {"reference_latents": [torch.zeros(1, 3, 32, 32)]}]]
    latent = torch.zeros(1, 3, 32, 32)
    comfy.sample.sample_custom(
        model,
        latent,
        1.0,
        comfy.samplers.sampler_object("euler"),
        torch.tensor([1.0, 0.0]),
        conditioning,
        conditioning,
        latent,
        disable_pbar=True,
    )


def vae_round_trip(path: str) -> float:
    """The largest change of an image that went through Load Checkpoint's VAE and back."""
    vae = load(path, "checkpoint")[2]
    image = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    return float((vae.decode(vae.encode(image)) - image).abs().max())


def save_and_reload(path: str, inputs: str, output: str) -> dict:
    """Save Checkpoint, then forward with what was saved."""
    model, _, vae = load(path, "checkpoint")
    saved = output + ".saved.safetensors"
    comfy.sd.save_checkpoint(saved, model, vae=vae)
    return forward(saved, "checkpoint", inputs, output)


def detect(shapes: dict[str, list[int]], prefix: str = "") -> str | None:
    """Which model ComfyUI takes these for."""
    with torch.device("meta"):
        config = comfy.model_detection.model_config_from_unet(
            {key: torch.empty(shape) for key, shape in shapes.items()}, prefix
        )
    return config and type(config).__name__


def detect_as_core(shapes: dict[str, list[int]]) -> str | None:
    """Which image_model ComfyUI's own detection takes these for, the pack's aside."""
    wrapped = comfy.model_detection.detect_unet_config
    core = next(
        cell.cell_contents
        for name, cell in zip(wrapped.__code__.co_freevars, wrapped.__closure__)
        if name == "core_detect"
    )
    found = core({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, "")
    return found and found.get("image_model")


def encode(prompt: str, output: str, text_encoder: str, **options) -> None:
    """Save the embeddings of a prompt and of the empty one. options: of L2PTextEncoderLoader."""
    with listed("text_encoders", text_encoder) as name:
        clip = nodes.NODE_CLASS_MAPPINGS["L2PTextEncoderLoader"].execute(name, **options)[0]
    clip.l2p_read_prompt = None  # prompts are encoded as they are, the bundled model's too
    positive, negative = nodes.NODE_CLASS_MAPPINGS["L2PTextEncode"].execute(clip, prompt, "").args
    save_file(
        {
            "positive": positive[0][0].float().contiguous(),
            "negative": negative[0][0].float().contiguous(),
        },
        output,
    )


def with_controlnet(path: str) -> None:
    """Sample under ComfyUI's Z-Image ControlNet, its weights aside."""
    from comfy_extras.nodes_model_patch import ZImageControlPatch

    model = load(path, "diffusion")[0].clone()
    patch = ZImageControlPatch.__new__(ZImageControlPatch)
    model.set_model_noise_refiner_patch(patch)
    model.set_model_double_block_patch(patch)
    model.model.diffusion_model(
        torch.zeros(1, 3, 32, 32),
        torch.ones(1),
        torch.zeros(1, 4, 64),
        4,
        transformer_options=model.model_options["transformer_options"],
    )


def stop_inside_a_step(path: str) -> list[str]:
    """Which parts of the network had run when ComfyUI stopped, Stop being pressed in its first
    layer."""
    model = load(path, "diffusion")[0]
    comfy.model_management.load_models_gpu([model], force_full_load=True)
    network, reached = model.model.diffusion_model, []
    for name in ("layers.0", "local_decoder"):
        network.get_submodule(name).register_forward_hook(
            lambda *_, name=name: (
                (
                    reached.append(name),
                    comfy.model_management.interrupt_current_processing(True),
                )
                and None
            )
        )
    try:
        with torch.no_grad():
            network(
                torch.zeros(1, 3, 32, 32),
                torch.ones(1),
                torch.zeros(1, 4, 64),
                4,
                transformer_options={},
            )
    except comfy.model_management.InterruptProcessingException:
        return reached
    finally:
        comfy.model_management.interrupt_current_processing(False)
    raise RuntimeError("Stop was not noticed")


def missing_packages(settings: dict, there: list[str]) -> str | None:
    """What a training node says of these settings where only these packages are installed."""
    train = of_pack("nodes.train")
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name: name if name in there else None
    try:
        train.check_packages(settings)
    except ImportError as error:
        return str(error)
    finally:
        importlib.util.find_spec = find_spec
    return None


def check_model(checkpoint: str, text_encoder: str) -> str:
    """The report of L2P Check Model. Both are paths, or names that its lists have."""
    with (
        listed("diffusion_models", checkpoint) as model,
        listed("text_encoders", text_encoder) as encoder,
        torch.inference_mode(),  # as ComfyUI runs nodes
    ):
        result = nodes.NODE_CLASS_MAPPINGS["L2PCheckModel"].execute(model, encoder)
    assert result.ui.value == result.args[0]
    return result.args[0]


def quantize_while_stopping(path: str) -> None:
    """Quantize with Stop pressed when the progress bar first moves; later moves may be too close
    together to be shown."""

    def press_stop(*_, **__) -> None:
        comfy.model_management.interrupt_current_processing(True)

    comfy.utils.set_progress_bar_global_hook(press_stop)
    try:
        with listed("diffusion_models", path) as name:
            nodes.NODE_CLASS_MAPPINGS["L2PQuantizeCheckpoint"].execute(
                name, "int8_tensorwise", "row", "small", "", False
            )
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        comfy.model_management.interrupt_current_processing(False)


def nodes_under(version: str | None = None, broken: str | None = None) -> list[list[str]]:
    """(nodes that the pack gives, what it logs) in a ComfyUI of that version, or without that
    module of the pack, as where something private of ComfyUI is gone."""
    import logging

    versions, said = of_pack("nodes.versions"), []
    pack_module = of_pack("nodes")
    real, log = versions.VERSION, logging.error
    kept = sys.modules.get(f"{pack_module.__name__}.{broken}") if broken else None
    versions.VERSION, logging.error = version or real, said.append
    if broken:
        sys.modules[f"{pack_module.__name__}.{broken}"] = None
        attribute = pack_module.__dict__.pop(broken)
    try:
        found = asyncio.run(pack_module.L2PExtension().get_node_list())
    finally:
        versions.VERSION, logging.error = real, log
        if broken:
            sys.modules[f"{pack_module.__name__}.{broken}"] = kept
            setattr(pack_module, broken, attribute)
    return [[node.__name__ for node in found], said]


def install_again() -> bool:
    """Whether a second import of the pack leaves ComfyUI as the first did."""
    before = (
        comfy.model_detection.detect_unet_config,
        comfy.lora.model_lora_keys_unet,
        len(comfy.supported_models.models),
    )
    asyncio.run(nodes.load_custom_node(pack))
    return before == (
        comfy.model_detection.detect_unet_config,
        comfy.lora.model_lora_keys_unet,
        len(comfy.supported_models.models),
    )


def core_detection_tests() -> int | None:
    """Exit status of ComfyUI's own tests of model detection, None where it has no pytest."""
    try:
        import pytest
    except ImportError:
        return None
    return int(
        pytest.main(
            [
                "-q",
                "-p",
                "no:cacheprovider",
                f"{root}/tests-unit/comfy_test/model_detection_test.py",
            ]
        )
    )


def memory(
    config: dict, size: int, dtype: str, batch: int = 1, backbone: str | None = None
) -> list[int]:
    """(bytes ComfyUI is told a pass takes, bytes that are alive at its peak) for a model of the
    published widths, counted on tensors without contents.

    config: arguments of L2PConfig, or of BackboneConfig beside its decoder."""
    import comfy.ldm.flux.math as flux_math
    import comfy.ldm.modules.attention as attention
    import comfy.ops

    pack_module = of_pack("nodes.comfy_model")
    decoder = of_pack("l2p_core.config").PUBLISHED_DECODERS[config["patch_size"]]
    network_class = of_pack("nodes.detection").DESCRIPTIONS[backbone].network
    if backbone:
        config["arguments"] = tuple(config["arguments"].items())
        l2p_config = of_pack("l2p_core.backbones").BackboneConfig(
            backbone, **config, decoder=decoder, bottleneck_dim=512
        )
    else:
        l2p_config = pack_module.L2PConfig(**config, decoder=decoder)
    dtype = getattr(torch, dtype)
    whole_scores = attention.optimized_attention_masked, flux_math.optimized_attention
    attention.optimized_attention_masked = flux_math.optimized_attention = lambda q, *_, **__: (
        torch.empty_like(q).movedim(1, 2).flatten(2)
    )  # no scores, as on a GPU
    with torch.device("meta"), torch.no_grad():
        network = network_class(
            l2p_config, dtype=dtype, operations=comfy.ops.disable_weight_init, device="meta"
        )
        image, caption = (
            torch.empty(batch, 3, size, size, dtype=dtype),
            torch.empty(batch, 100, l2p_config.cap_feat_dim, dtype=dtype),
        )
        counted, _ = of_pack("l2p_core.meter").peak_bytes(
            lambda: network(image, torch.ones(batch), caption, 100, transformer_options={})
        )
    attention.optimized_attention_masked, flux_math.optimized_attention = whole_scores
    model = pack_module.L2PModel.__new__(pack_module.L2PModel)
    torch.nn.Module.__init__(model)
    model.diffusion_model, model.get_dtype_inference = network, lambda: dtype
    return [int(model.memory_required([batch, 3, size, size])), counted]


def images_in_flight(path: str, size: int) -> float:
    """How many float32 images of that size ComfyUI's euler sampler holds, with guidance, as the
    network is entered."""
    model, counts = load(path, "diffusion")[0], []
    network = model.model.diffusion_model
    forward = network._forward
    positive, negative = (
        [[torch.zeros(1, length, network.config.cap_feat_dim), {}]] for length in (4, 6)
    )
    with torch.inference_mode(), of_pack("l2p_core.meter").Meter() as meter:
        network._forward = lambda *args, **kwargs: (
            counts.append(meter.now()),
            forward(*args, **kwargs),
        )[1]
        latent = torch.zeros(1, 3, size, size)
        noise = comfy.sample.prepare_noise(latent, 0)
        comfy.sample.sample_custom(
            model,
            noise,
            2.0,
            comfy.samplers.sampler_object("euler"),
            torch.tensor([1.0, 0.8, 0.5, 0.0]),
            positive,
            negative,
            latent,
            disable_pbar=True,
        )
    return max(counts) / (3 * size**2 * 4)


def guided_step(path: str, output: str, size: int, patched: bool) -> list[int]:
    """Sample one guided step, prompts of 5 and 40 tokens, and write its latent. Returns the number
    of images in each run of the noise refiner. patched: beside a patch that changes nothing."""
    model, batches = load(path, "diffusion")[0].clone(), []
    if patched:
        model.set_model_patch(lambda given: {}, "double_block")
    network = model.model.diffusion_model
    handle = network.noise_refiner[0].register_forward_pre_hook(
        lambda _, args: batches.append(len(args[0]))
    )
    generator = torch.Generator().manual_seed(0)
    positive, negative = (
        [[torch.randn(1, length, network.config.cap_feat_dim, generator=generator), {}]]
        for length in (40, 5)
    )
    noise = torch.randn(2, 3, size, size, generator=generator)
    latent = comfy.sample.sample_custom(
        model,
        noise,
        2.0,
        comfy.samplers.sampler_object("euler"),
        torch.tensor([0.9, 0.5]),
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
    )
    handle.remove()
    save_file({"latent": latent.contiguous()}, output)
    return batches


def shortage(path: str, have: int, batch_size: int, **settings) -> str | None:
    """What the sampler says of that generating on a device of so many bytes."""
    sampler = of_pack("nodes.sample")
    model = load(path, "diffusion")[0]
    _, _, trained = sampler.sizes_of(model)
    plan = sampler.plan_stages(sampler.Settings(num_inference_steps=4, **settings), trained, 16)
    return sampler.shortage(model, plan, batch_size, have)


def largest_asked_for(path: str, size: int, **options) -> int:
    """The most bytes that ComfyUI makes room for at the least, as an image of so many pixels is
    generated."""
    model, conditioning, asked = load(path, "diffusion")[0], [[torch.zeros(1, 4, 96), {}]], []
    estimate = comfy.sampler_helpers.estimate_memory

    def recorded(*args):
        asked.append(estimate(*args))
        return asked[-1]

    comfy.sampler_helpers.estimate_memory = recorded
    try:
        nodes.NODE_CLASS_MAPPINGS["L2PKSampler"].execute(
            model,
            conditioning,
            conditioning,
            size,
            size,
            1,
            0,
            2,
            2.0,
            "euler",
            "l2p",
            3.0,
            1.0,
            **options,
        )
    finally:
        comfy.sampler_helpers.estimate_memory = estimate
    return int(max(least for _, least in asked))


def draw_by(
    sampler_name: str,
    scheduler: str,
    steps: int,
    denoise: float = 1.0,
    node: str = "L2PKSampler",
    side: int = 96,
    output: str | None = None,
    prompt: str = "a large red circle on a blue background, left",
) -> float | None:
    """Generate a square with the bundled small model by ComfyUI's KSampler or ours, at seed 7 and
    cfg 2.

    With an output, save the latent. Otherwise return the largest difference between the two nodes,
    None where neither gives finite numbers."""
    model, positive, negative = bundled(prompt)
    start = torch.zeros(1, side, side, 3) + 0.5

    def ours() -> torch.Tensor:
        image = {"image": start} if denoise < 1 else {}
        options = (side, side, 1, 7, steps, 2.0, sampler_name, scheduler, 3.0, denoise)
        node_class = nodes.NODE_CLASS_MAPPINGS["L2PKSampler"]
        return node_class.execute(model, positive, negative, *options, **image)[1]["samples"]

    def cores() -> torch.Tensor:
        latent = {"samples": start.movedim(-1, 1) * 2 - 1}
        (drawn,) = nodes.KSampler().sample(
            model, 7, steps, 2.0, sampler_name, scheduler, positive, negative, latent, denoise
        )
        return drawn["samples"]

    if output:
        samples = ours() if node == "L2PKSampler" else cores()
        save_file({"samples": samples.float().contiguous()}, output)
        return None
    try:
        found = ours()
    except ValueError as error:
        assert "NaN" in str(error)
        found = torch.full((1, 3, side, side), torch.nan)
    expected = cores()
    if not expected.isfinite().all():
        return None if not found.isfinite().all() else float("inf")
    return float((found - expected).abs().max())


def choices() -> list[list[str]]:
    """ComfyUI's samplers and its schedulers."""
    return [list(comfy.samplers.KSampler.SAMPLERS), list(comfy.samplers.KSampler.SCHEDULERS)]


def warned_samplers() -> list[list[str]]:
    """Those that L2P KSampler says do not suit, and those it says leave noise."""
    sample = of_pack("nodes.sample")
    return [list(sample.UNUSABLE_SAMPLERS), list(sample.GRAINY_SAMPLERS)]


@functools.cache
def bundled(prompt: str) -> tuple:
    """The bundled small model, with the prompt and the empty prompt encoded."""
    name = "L2P shapes (bundled small model)"
    model = nodes.NODE_CLASS_MAPPINGS["L2PCheckpointLoader"].execute(name, "float32")[0]
    clip = nodes.NODE_CLASS_MAPPINGS["L2PTextEncoderLoader"].execute(name)[0]
    return model, *nodes.NODE_CLASS_MAPPINGS["L2PTextEncode"].execute(clip, prompt, "").args


def reloaded_encoder(folder: str, prompt: str) -> float:
    """Save the bundled model and its text encoder by Save Checkpoint, and load both again.

    Returns the largest difference of the prompt embeddings."""
    name = "L2P shapes (bundled small model)"
    model = bundled(prompt)[0]
    clip = nodes.NODE_CLASS_MAPPINGS["L2PTextEncoderLoader"].execute(name)[0]
    path = f"{folder}/saved.safetensors"
    comfy.sd.save_checkpoint(path, model, clip=clip)
    again = comfy.sd.load_checkpoint_guess_config(path)[1]
    encode = nodes.NODE_CLASS_MAPPINGS["L2PTextEncode"].execute
    before, after = (encode(each, prompt, "").args[0][0][0] for each in (clip, again))
    return float((before - after).abs().max())


def shift_by_another_node(node: str, shift: float) -> list[str]:
    """What is logged when that node comes before L2P KSampler. Raises what the sampler does."""
    import logging

    model, positive, negative = bundled("a large red circle on a blue background, left")
    module = importlib.import_module("comfy_extras.nodes_model_advanced")
    node_class = getattr(module, node)
    (patched,) = getattr(node_class(), node_class.FUNCTION)(model, shift)
    options = (96, 96, 1, 7, 1, 1.0, "euler", "l2p", 3.0, 1.0)
    said, log = [], logging.warning
    logging.warning = said.append
    try:
        nodes.NODE_CLASS_MAPPINGS["L2PKSampler"].execute(patched, positive, negative, *options)
    finally:
        logging.warning = log
    return said


def draw_backbone(
    path: str,
    text_encoder: str,
    latent_model: str,
    prompt: str,
    output: str,
    node: str = "L2PKSampler",
    stage_attention: str | None = None,
) -> dict:
    """Generate 48 x 32 pixels in 4 steps by our nodes at seed 3, cfg 4 and the model's shift.

    Saves the image (H, W, 3) and the last preview, in levels of 255. node: L2PKSampler or KSampler.
    stage_attention: of L2P Stages. Returns how many previews were shown, and what was logged."""
    import logging

    import numpy as np

    node_classes, shown, said = nodes.NODE_CLASS_MAPPINGS, [], []
    warn, logging.warning = logging.warning, lambda text, *_: said.append(text)
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id: shown.append(preview)
    )
    try:
        model, _, _ = load(path, "node", weight_dtype="float32")
        with listed("text_encoders", text_encoder) as name:
            clip = node_classes["L2PTextEncoderLoader"].execute(name, latent_model=latent_model)[0]
        positive, negative = node_classes["L2PTextEncode"].execute(clip, prompt, "").args
        if node == "KSampler":
            latent = {"samples": torch.zeros(1, 3, 32, 48)}
            given = (model, 3, 4, 4.0, "euler", "simple", positive, negative, latent)
            samples = nodes.KSampler().sample(*given)[0]["samples"]
            image = of_pack("nodes.latents").to_image(samples)
        else:
            shift = float(model.model.model_sampling.shift)
            given = (48, 32, 1, 3, 4, 4.0, "euler", "l2p", shift, 1.0)
            options = {}
            if stage_attention:
                stages = node_classes["L2PStages"].execute
                options["stage_options"] = stages(
                    2, 0.5, "interpolated", stage_attention=stage_attention
                )[0]
            image = node_classes[node].execute(model, positive, negative, *given, **options)[0]
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
        logging.warning = warn
    previews = [torch.tensor(np.array(each[1])) for each in shown if each is not None]
    save_file(
        {"image": (image[0] * 255).floor().to(torch.uint8).contiguous()}
        | ({"preview": previews[-1]} if previews else {}),
        output,
    )
    return {"previews": len(previews), "said": said}


def notes_of_sampler(sampler_name: str, **numbers) -> list[str]:
    """What L2P KSampler logs with that sampler. numbers: cfg, shift or denoise, as text."""
    import logging

    model, positive, negative = bundled("a large red circle on a blue background, left")
    cfg, shift, denoise = (
        float(numbers.get(name, value))
        for name, value in (("cfg", 2), ("shift", 3), ("denoise", 1))
    )
    said, log = [], logging.warning
    logging.warning = said.append
    try:
        nodes.NODE_CLASS_MAPPINGS["L2PKSampler"].execute(
            *(model, positive, negative, 96, 96, 1, 7, 2),
            *(cfg, sampler_name, "l2p", shift, denoise),
        )
    finally:
        logging.warning = log
    return said


def areas(node: str, stages: int = 1) -> float:
    """The mean difference in levels of 255 that an area of the whole image makes, set in pixels.

    node: KSampler or L2PKSampler."""
    side = 96 * 2 ** (stages - 1)
    model, positive, negative = bundled("a large red circle on a blue background, left")
    (area,) = nodes.ConditioningSetArea().append(positive, side, side, 0, 0, 1.0)

    def draw(conditioning: list) -> torch.Tensor:
        if node == "KSampler":
            latent = {"samples": torch.zeros(1, 3, side, side)}
            options = (2.0, "euler", "simple", conditioning, negative, latent)
            return nodes.KSampler().sample(model, 7, 4, *options)[0]["samples"]
        options = (side, side, 1, 7, 4, 2.0, "euler", "l2p", 3.0, 1.0)
        node_class = nodes.NODE_CLASS_MAPPINGS["L2PKSampler"]
        return node_class.execute(model, conditioning, negative, *options, stages=stages)[1][
            "samples"
        ]

    return float((draw(positive) - draw(area)).abs().mean() * 127.5)


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
