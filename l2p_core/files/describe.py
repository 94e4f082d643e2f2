"""What a checkpoint is and what to do with it: `l2p inspect`."""

from collections import Counter
from pathlib import Path

from .header import CheckpointError
from .layout import read_layout
from .load import check

KINDS = {
    "model": "L2P model",
    "part": "trained part of an L2P model",
    "latent": "latent model",
    "lora": "LoRA",
    "text encoder": "text encoder",
    "unknown": "not an L2P model",
}


def describe(path: Path) -> dict:
    """Facts about a checkpoint, ready for JSON. Raises CheckpointError where the file is no whole
    safetensors file."""
    layout = read_layout(path)
    dtypes: Counter[str] = Counter()
    for entry in layout.entries.values():
        dtypes[entry.dtype] += entry.count
    facts = {
        "path": str(path),
        "kind": f"latent {layout.model}" if layout.kind == "latent" else KINDS[layout.kind],
        "backbone": layout.model if layout.kind in ("model", "part", "latent") else None,
        "files": len(layout.files),
        "bytes": sum(file.stat().st_size for file in layout.files),
        "tensors": len(layout.entries),
        "parameters": layout.parameters or sum(dtypes.values()),
        "dtypes": dict(dtypes.most_common()),
        "naming": layout.naming,
        "prefix": layout.prefix,
        "quantization": layout.quantization,
        "other_tensors": len(layout.outside),
        "default_settings": layout.default_settings,
        "metadata": layout.metadata,
    }
    try:
        check(layout)
        config = layout.config
        facts |= {
            "patch": config.patch_size,
            "height": layout.trained_size[0],
            "width": layout.trained_size[1],
            "size_multiple": config.size_multiple,
            "config": dict(vars(config)),
            "summary": config.summary,
            "usable": True,
            "advice": (
                f'Generate with it: l2p generate "a prompt" --checkpoint {path} --text-encoder '
                + (config.text_encoder or "FOLDER, where FOLDER is the text encoder of this model")
            ),
        }
    except (CheckpointError, ImportError) as error:
        facts |= {"usable": False, "advice": str(error)}
    return facts


def report(facts: dict) -> str:
    """The facts as lines for people."""
    numbers = sum(facts["dtypes"].values()) or 1
    dtypes = ", ".join(f"{dtype} {count / numbers:.0%}" for dtype, count in facts["dtypes"].items())
    size = (
        f"{facts['bytes'] / 1e9:.2f} GB"
        if facts["bytes"] >= 1e8
        else f"{facts['bytes'] / 1e6:.2f} MB"
    )
    lines = [
        f"{facts['path']}: {facts['kind']}",
        (
            f"  {size} in {facts['files']} file{'s' * (facts['files'] > 1)}, "
            f"{facts['tensors']} tensors, {facts['parameters']:,} parameters ({dtypes})"
        ),
    ]
    if "config" in facts:
        lines += [
            (
                f"  patch {facts['patch']}: trained for about {facts['width']} x {facts['height']}"
                f" pixels, sides in multiples of {facts['size_multiple']}"
            ),
            f"  {facts['summary']}",
        ]
        lines += [
            f"  {facts['naming']} tensor names, key prefix {facts['prefix'] or '(none)'}, "
            f"{'quantized: ' + facts['quantization'] if facts['quantization'] else 'not quantized'}"
        ]
    if facts["default_settings"]:
        settings = (f"{name} {value}" for name, value in facts["default_settings"].items())
        lines += [f"  default settings: {', '.join(settings)}"]
    if facts["other_tensors"]:
        lines += [f"  the file also holds {facts['other_tensors']} tensors of other models"]
    return "\n".join([*lines, f"  {facts['advice']}"])
