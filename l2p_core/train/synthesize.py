"""Pictures to train on, drawn by the source model itself: prompts → images/ and metadata.csv.

That is the paper's data step (arXiv 2605.12013): what a pixel model learns from is its own latent
self, two pictures a prompt."""

import csv
import io
import json
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from ..batch import is_drawn
from ..devices import default_device
from ..files.atomic import WAIT, atomic_write, locked
from ..files.header import CheckpointError
from ..images import save_image
from ..pipeline import usable_device
from .config import Draws

# What a Z-Image's model_index.json may name: (library, class).
COMPONENTS = {
    ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    ("diffusers", "AutoencoderKL"),
    ("diffusers", "ZImageTransformer2DModel"),
    ("transformers", "Qwen3Model"),
    ("transformers", "Qwen3ForCausalLM"),
    ("transformers", "Qwen2Tokenizer"),
    ("transformers", "Qwen2TokenizerFast"),
}

if TYPE_CHECKING:
    from diffusers import ZImagePipeline


def synthesize(
    prompts: list[str],
    model: str | Path,
    output: Path,
    draws: Draws | None = None,
    batch: int = 1,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    processes: int = 1,
    progress: bool = True,
) -> None:
    """Draw every prompt `draws.count` times into output/images, and write metadata.csv (image,
    prompt, seed) once all are there.

    model: a folder that diffusers' ZImagePipeline opens, such as Z-Image-Turbo. Pictures that are
    there with the same settings are kept. rank, processes: this process's share. Raises ValueError
    where others are there, AlreadyRunning where another run still writes there after `WAIT`
    seconds, CheckpointError for the model."""
    draws = draws or Draws()
    images = output / "images"
    pictures = [
        (images / f"{number:06d}-{copy}.png", prompt, draws.seed + number * draws.count + copy)
        for number, prompt in enumerate(prompts)
        for copy in range(draws.count)
    ]

    def settings(prompt: str, seed: int) -> dict:
        return {
            "prompt": prompt,
            "seed": seed,
            "model": Path(model).name,
            "height": draws.height,
            "width": draws.width,
            "num_inference_steps": draws.steps,
            "guidance_scale": draws.guidance,
        }

    busy = f"another run is writing to {output}. Wait for it to finish, or give another --output"
    with (
        nullcontext() if rank else locked(output, busy, WAIT, folder=True)
    ):  # the first process locks for all
        images.mkdir(parents=True, exist_ok=True)
        missing = [
            (file, prompt, seed)
            for file, prompt, seed in pictures[rank::processes]
            if not file.exists() or not is_drawn(file, settings(prompt, seed))
        ]
        if missing:
            pipe = open_pipeline(
                model,
                usable_device(device or default_device()),
                dtype,
            )
            queue = iter(missing)
            with tqdm(total=len(missing), unit="picture", disable=not progress) as bar:
                while group := list(islice(queue, batch)):
                    drawn = pipe(
                        prompt=[prompt for _, prompt, _ in group],
                        height=draws.height,
                        width=draws.width,
                        num_inference_steps=draws.steps,
                        guidance_scale=draws.guidance,
                        generator=[torch.Generator().manual_seed(seed) for _, _, seed in group],
                    ).images
                    for (file, prompt, seed), picture in zip(group, drawn, strict=True):
                        save_image(picture, file, settings(prompt, seed))
                    bar.update(len(group))
        if all(file.exists() for file, _, _ in pictures):  # so says the process that ends last
            text = io.StringIO(newline="")
            rows = [(file.name, prompt, seed) for file, prompt, seed in pictures]
            csv.writer(text).writerows([("image", "prompt", "seed"), *rows])
            with atomic_write(output / "metadata.csv") as stream:
                stream.write(text.getvalue().encode())


def refuse_other_components(model: Path) -> None:
    """Raise CheckpointError where model_index.json names classes that are not Z-Image's: diffusers
    would import the modules that it names, and transformers' Auto classes ask whether to run a
    folder's own code."""
    try:
        if not (model / "model_index.json").is_file():
            raise FileNotFoundError
        index = json.loads((model / "model_index.json").read_text(encoding="utf-8"))
        components = {
            name: tuple(map(str, value))
            for name, value in index.items()
            if not name.startswith("_")
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(
            f"{model} is no latent Z-Image: it has no readable model_index.json. Give the folder of"
            " Tongyi-MAI/Z-Image-Turbo"
        ) from None
    if index.get("_class_name") != "ZImagePipeline":
        raise CheckpointError(
            f"{model} holds a {str(index.get('_class_name'))[:80]}, expected a ZImagePipeline. Give"
            " the folder of Tongyi-MAI/Z-Image-Turbo"
        )
    for name, component in components.items():
        if component not in COMPONENTS:
            raise CheckpointError(
                f"{model / 'model_index.json'} names {str(component)[:80]} as its {name}, which"
                " this program does not import. Give the folder of Tongyi-MAI/Z-Image-Turbo"
            )


def open_pipeline(model: str | Path, device: torch.device, dtype: torch.dtype) -> "ZImagePipeline":
    """The latent model through diffusers. Raises CheckpointError, ImportError where diffusers is
    not installed."""
    try:
        from diffusers import ZImagePipeline
    except ImportError:
        raise ImportError(
            "drawing with the latent model needs diffusers 0.36 or newer: pip install"
            " 'comfyui-l2p[synthesize]'"
        ) from None
    refuse_other_components(Path(model))
    try:
        pipe = ZImagePipeline.from_pretrained(
            model,
            torch_dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except Exception as error:  # whatever diffusers makes of a damaged folder
        raise CheckpointError(
            f"{model} is no latent Z-Image that diffusers can open: {str(error).splitlines()[0]}."
            " Give the folder of Tongyi-MAI/Z-Image-Turbo"
        ) from None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
