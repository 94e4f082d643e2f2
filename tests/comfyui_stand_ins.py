"""ComfyUIs that can't be had yet, made from one that is there: the facts of newer releases, in
words of our own.

`newest` has the signatures of NextDiT in Comfy-Org/ComfyUI at 617048a5 (v0.38): arguments that an
older subclass of it does not take. `rival` recognises L2P models itself, as pull request 14055 of
Comfy-Org/ComfyUI proposes: the first detection that is asked, for models 3840 wide, with a class of
its own."""

import re
import shutil
from pathlib import Path

LEFT_OUT = {
    ".git",
    ".venv",
    "models",
    "output",
    "input",
    "user",
    "custom_nodes",
}  # at the top of a checkout

RIVAL_CLASS = """

class RivalL2P(ZImagePixelSpace):
    unet_config = {"image_model": "zimage_l2p"}

    def get_model(self, state_dict, prefix="", device=None):
        raise RuntimeError("the rival L2P class was asked for a model")


models.insert(0, RivalL2P)
"""
RIVAL_DETECTION = """
    width = state_dict.get(key_prefix + "x_pad_token")
    known = key_prefix + "local_decoder.enc1.0.weight" in state_dict
    if known and width is not None and width.shape[-1] == 3840:
        return {"image_model": "zimage_l2p", "patch_size": 16}
"""


def make_stand_in(root: Path, folder: Path) -> Path:
    """A copy of a ComfyUI with both changes. Raises AssertionError where it has not the code that
    they change."""
    copy = folder / "ComfyUI"
    shutil.copytree(
        root, copy, ignore=lambda path, names: LEFT_OUT & set(names) if Path(path) == root else ()
    )
    for name in ("models", "custom_nodes", "input", "output"):
        (copy / name).mkdir()
    newest_nextdit(copy / "comfy" / "ldm" / "lumina" / "model.py")
    rival_detection(copy / "comfy")
    return copy


def newest_nextdit(path: Path) -> None:
    """NextDiT calls its own methods with arguments that they did not have before."""
    text = path.read_text()
    for pattern, replacement in (
        (r"(def unpatchify\(\s*self,[^)]*?return_tensor=False)(\s*\))", r"\1, frames=None\2"),
        (r"(self\.unpatchify\([^)]*?return_tensor=\w+)\)", r"\1, frames=None)"),
        (
            r"(def patchify_and_embed\(\s*self,[^)]*?siglip_feats=\[\],)",
            r"\1 direct_context=None, ref_frames=[],",
        ),
        (
            r"(self\.patchify_and_embed\([^)]*?siglip_feats=siglip_feats,)",
            r"\1 direct_context=None, ref_frames=[],",
        ),
    ):
        text, count = re.subn(pattern, replacement, text)
        assert count, f"{path} has nothing like {pattern}"
    path.write_text(text)


def rival_detection(comfy: Path) -> None:
    """ComfyUI takes L2P models of the published width for its own."""
    models = comfy / "supported_models.py"
    models.write_text(models.read_text() + RIVAL_CLASS)
    detection = comfy / "model_detection.py"
    start = "def detect_unet_config(state_dict, key_prefix, metadata=None):\n"
    text = detection.read_text()
    assert start in text, f"{detection} has another detect_unet_config"
    detection.write_text(text.replace(start, start + RIVAL_DETECTION))
