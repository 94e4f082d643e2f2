"""Compare checkpoints, formats or settings: `l2p evaluate compare`."""

import argparse
from pathlib import Path
from typing import Any

import torch

from ..commands.arguments import pipeline_arguments, share
from ..pipeline import L2PPipeline
from . import metrics, shapes
from .layout import Task, Written, read_card, read_folder, read_task
from .report import Figure, Table, card_table, markdown, save_sheet, write_html, write_json
from .variant import Variant, read_variant
from .write import flag_settings, shapes_encoder, write

COMPARED, REPORT, SHEET = "compare.json", "report.html", "worst-{}.png"
WORST = 10  # pairs on a sheet


def run_compare(args: argparse.Namespace) -> None:
    """Generate with each variant, and compare all with the first."""
    variants = [read_variant(each) for each in args.variants]
    if len(variants) < 2:
        raise ValueError("one checkpoint is nothing to compare; give two or more")
    if args.prompts is None and any(each.folder is None for each in variants):
        raise ValueError(
            "give --prompts FILE, or --prompts shapes for the bundled model and what is made of it"
        )
    rank, processes, device = share(args.device)
    if processes > 1:
        raise ValueError(
            "compare runs in one process; split the images over several with l2p evaluate write,"
            " then compare the folders"
        )
    images = []
    for index, variant in enumerate(variants):
        folder = variant.folder
        if folder is None:
            folder = args.output / f"{index}-{variant.folder_name}"
            task = generate(args, variant, folder, device)
            images.append([each for each in read_folder(folder) if each.name in task.names])
        else:
            images.append(read_folder(folder))
    args.output.mkdir(parents=True, exist_ok=True)
    report_compared(variants, images, args.output)


def generate(args: argparse.Namespace, variant: Variant, folder: Path, device: str) -> Task:
    """Generate with a variant, and return what was generated."""
    benchmark = "shapes" if args.prompts == "shapes" else "prompts"
    source = None if benchmark == "shapes" else Path(args.prompts)
    task = read_task(benchmark, source, args.limit, args.count)
    print(f"{variant.name}:", flush=True)
    write(
        task,
        open_variant(args, variant, device),
        {**flag_settings(args), **variant.settings},
        folder,
        args.batch,
        args.free_text_encoder,
        args.overwrite,
    )
    return task


def open_variant(args: argparse.Namespace, variant: Variant, device: str) -> L2PPipeline:
    """Open a variant's checkpoint with the flags' options and, over them, its own ones."""
    options = {**pipeline_arguments(args), "checkpoint": variant.checkpoint}
    if args.prompts == "shapes":
        options["text_encoder"] = shapes_encoder(variant.checkpoint, args.text_encoder)
    own = dict(variant.options)
    if "dtype" in own:
        options["torch_dtype"] = getattr(torch, own.pop("dtype"))
    if "convrot" in own:
        options["convrot_groupsize"] = own.pop("convrot")
    return L2PPipeline.from_pretrained(**{**options, **own}, device=device)


def report_compared(variants: list[Variant], images: list[list[Written]], output: Path) -> None:
    """Compare every variant with the first, and write the table, the sheets and the report."""
    scored = all(map(shapes.is_scored, images))
    lpips = metrics.load_lpips()
    rows: list[dict[str, Any]] = []
    figures: list[Figure] = []
    for index, (variant, written) in enumerate(zip(variants, images)):
        folder = written[0].path.parents[2]
        row: dict[str, Any] = {"name": variant.name, "card": read_card(folder)}
        if scored:
            row["shapes"] = shapes.score(written)
        if index:
            pairs = metrics.compare(images[0], written, lpips)
            row |= metrics.summarize(pairs)
            row["pairs"] = [
                {
                    "name": each.name,
                    "psnr": metrics.finite(each.psnr),
                    "ssim": each.ssim,
                    "lpips": each.lpips,
                }
                for each in pairs
            ]
            if apart := metrics.worst(pairs, WORST):
                sheet = output / SHEET.format(index)
                save_sheet(apart, sheet)
                figures.append(Figure(sheet, f"{variant.name}: the pairs farthest apart"))
        rows.append(row)
    table = Table(f"Against {variants[0].name}", compared_rows(rows, scored, lpips is not None))
    notes = ["PSNR is over all images together, with 255 as the peak."]
    if lpips is None:
        notes.append("LPIPS was not computed: it needs the package lpips.")
    write_json(output / COMPARED, {"compared": rows})
    cards = [card_table(row["card"], row["name"]) for row in rows if row["card"]]
    write_html(output / REPORT, "Comparison", notes, [table], figures, cards)
    print("\n".join(notes))
    print(f"\n{markdown(table)}\n\n{output / REPORT}")


def compared_rows(rows: list[dict[str, Any]], scored: bool, lpips: bool) -> list[tuple]:
    """The table of a comparison; its first row names the columns."""
    head = ["", "PSNR", "worst PSNR", "SSIM", "worst SSIM", *(["LPIPS"] if lpips else [])]
    head += ["right"] if scored else []
    lines = [tuple(head)]
    for row in rows:
        if "psnr" in row:
            cells = [decibels(row["psnr"]), decibels(row["worst_psnr"])]
            cells += [f"{row['ssim']:.4f}", f"{row['worst_ssim']:.4f}"]
            cells += [f"{row['lpips']:.4f}"] if lpips else []
        else:
            cells = [""] * (4 + lpips)
        cells += [f"{row['shapes']['right']:.1f}"] if scored else []
        lines.append((Path(row["name"]).name, *cells))
    return lines


def decibels(value: float | None) -> str:
    """Return a PSNR in words."""
    return "the same" if value is None else f"{value:.1f} dB"
