"""Adapters written out by hand, apart from the code under test."""

import torch

RANK = 4
LORA_TARGETS = (
    "layers.0.attention.to_q",
    "layers.0.attention.to_v",
    "layers.1.feed_forward.w2",
    "local_decoder.dec2.0",
)
LORA_NAMINGS = {
    "ai-toolkit": ("diffusion_model.{}".format, "lora_A", "lora_B"),
    "DiffSynth": ("{}".format, "lora_A.default", "lora_B.default"),
    "kohya": (lambda layer: "lora_unet_" + layer.replace(".", "_"), "lora_down", "lora_up"),
}


def a_lora(weights, naming="ai-toolkit", alpha=None):
    """(its file's tensors, what it adds to each weight)."""
    name_of, down, up = LORA_NAMINGS[naming]
    file, added, generator = {}, {}, torch.Generator().manual_seed(0)
    for layer in LORA_TARGETS:
        weight = weights[f"{layer}.weight"]
        a = torch.randn(4, *weight.shape[1:], generator=generator)
        b = torch.randn(len(weight), 4, *[1] * (weight.dim() - 2), generator=generator)
        file |= {f"{name_of(layer)}.{down}.weight": a, f"{name_of(layer)}.{up}.weight": b}
        if alpha is not None:
            file[f"{name_of(layer)}.alpha"] = torch.tensor(float(alpha))
        added[f"{layer}.weight"] = torch.einsum("nr,r...->n...", b.flatten(1), a) * (
            1 if alpha is None else alpha / 4
        )
    return file, added


def packed_change(
    kind: str, rows: int, inputs: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(what a LoRA file holds for one packed layer, the change it makes, written out longhand)."""
    generator = torch.Generator().manual_seed(3)

    def draw(*size):
        return 0.6 * torch.randn(*size, generator=generator)

    alpha = {"alpha": torch.tensor(2.0)}
    if kind in ("lora_A", "lora_down"):
        names = ("lora_A", "lora_B") if kind == "lora_A" else ("lora_down", "lora_up")
        down, up = draw(RANK, inputs), draw(rows, RANK)
        return {
            f"{names[0]}.weight": down,
            f"{names[1]}.weight": up,
            **alpha,
        }, 2.0 / RANK * up @ down
    if kind == "loha":
        a1, b1, a2, b2 = draw(rows, RANK), draw(RANK, inputs), draw(rows, RANK), draw(RANK, inputs)
        held = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, **alpha}
        return held, 2.0 / RANK * (a1 @ b1) * (a2 @ b2)
    if kind == "diff":
        change = draw(rows, inputs)
        return {"diff": change}, change
    first = 6 if kind == "lokr" else 4  # 4 rows of blocks can't be cut in three
    w1, a, b = draw(first, 8), draw(rows // first, RANK), draw(RANK, inputs // 8)
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, **alpha}, 2.0 / RANK * torch.kron(
        w1, a @ b
    )
