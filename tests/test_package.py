"""What the package promises about itself."""

import ast
import subprocess
import sys
from pathlib import Path

import comfyui_l2p
import pytest
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL

ROOT = Path(comfyui_l2p.__file__).parent
SOURCES = [
    path for folder in ("l2p_core", "quant") for path in sorted((ROOT / folder).rglob("*.py"))
]


def test_public_names_are_where_they_are_promised():
    from comfyui_l2p.l2p_core import L2PConfig, L2PPipeline, L2PTransformer, load_model

    assert all(map(callable, (L2PConfig, L2PPipeline, L2PTransformer, load_model)))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_lower_floors_import_no_comfyui(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            )
        )
        assert not {name.split(".")[0] for name in names} & {
            "comfy",
            "comfy_api",
            "folder_paths",
            "nodes",
            "execution",
        }


def test_importing_touches_nothing(tmp_path):
    code = (
        "import comfyui_l2p, comfyui_l2p.l2p_core, os, logging; print(os.listdir('.'),"
        " logging.getLogger().handlers)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[] []" and result.stderr == ""


def test_the_bundled_model_stays_small():
    assert (
        sum(file.stat().st_size for file in BUNDLED_MODEL.rglob("*") if file.is_file()) < 8_000_000
    )
