"""The web page: static files of our own, and what the page needs to know of the checkpoint."""

import math
from pathlib import Path

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from ..settings import FIELDS
from .requests import EDIT_STRENGTH, SETTINGS
from .service import Service

FILES = Path(__file__).parent / "web"
EXAMPLE = "a large red circle on a blue background"  # a prompt that the bundled model knows
RATIOS = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))  # width to height


def add_page(app: FastAPI, service: Service, language: str | None) -> None:
    """Serve the page at /. language: "en" or "zh"; None for what the browser prefers."""
    facts = page_facts(service, language)

    @app.get("/settings", include_in_schema=False)
    async def settings() -> dict:
        return facts

    app.mount("/", StaticFiles(directory=FILES, html=True))


def page_facts(service: Service, language: str | None) -> dict:
    """Return the settings with their defaults for this checkpoint, the sizes and the limits."""
    defaults = service.pipe.complete({})
    limits = service.limits
    return {
        "model": service.model_name,
        "example": EXAMPLE if service.bundled else "",
        "language": language,
        "multiple": service.pipe.layout.config.size_multiple,
        "presets": size_presets(
            service.pipe.layout.trained_size, service.pipe.layout.config.size_multiple
        ),
        "limits": {"side": limits.side, "steps": limits.steps, "images": limits.images},
        "edit_strength": EDIT_STRENGTH,
        "settings": [
            {
                "name": name,
                "default": getattr(defaults, name),
                "choices": FIELDS[name].metadata.get("choices"),
            }
            for name in SETTINGS
        ],
    }


def size_presets(trained_size: tuple[int, int], multiple: int) -> list[tuple[int, int]]:
    """Return widths and heights of about as many pixels as the trained resolution, which comes
    first."""
    height, width = trained_size
    pixels = height * width

    def nearest(side: float) -> int:
        return max(round(side / multiple), 1) * multiple

    sizes = [(width, height)]
    for across, down in RATIOS:
        ratio = across / down
        sizes.append((nearest(math.sqrt(pixels * ratio)), nearest(math.sqrt(pixels / ratio))))
    return list(dict.fromkeys(sizes))
