"""What the package promises about itself."""

import ast
import io
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import comfyui_l2p
import pytest
from comfyui_l2p import l2p_core
from comfyui_l2p.l2p_core.pipeline import BUNDLED_MODEL

ROOT = Path(comfyui_l2p.__file__).parent
SOURCES = [
    path for folder in ("l2p_core", "quant") for path in sorted((ROOT / folder).rglob("*.py"))
]


PUBLIC = {
    "CheckpointError": "Exception",
    "L2PConfig": "object",
    "L2PPipeline": "object",
    "L2PTransformer": "Module",
    "load_model": "function",
    "read_layout": "function",
}


def test_public_names_stay_what_they_are():
    """Listed here too, so that one can't go unnoticed."""
    assert set(l2p_core.__all__) == set(PUBLIC) and set(PUBLIC) <= set(dir(l2p_core))
    for name, kind in PUBLIC.items():
        value = getattr(l2p_core, name)
        found = (
            [each.__name__ for each in type.mro(value)] if isinstance(value, type) else ["function"]
        )
        assert kind in found and value.__doc__
    with pytest.raises(AttributeError, match="has no attribute nonsense"):
        l2p_core.nonsense


def test_the_version_is_the_same_everywhere():
    written = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert comfyui_l2p.__version__ == written[1]


def test_the_registry_finds_what_it_shows():
    written = (ROOT / "pyproject.toml").read_text()
    for field in ("Repository", "PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"):
        assert re.search(rf'^{field} = "\S+"$', written, re.MULTILINE), field
    for field, most in (("Icon", 400), ("Banner", 2000)):
        path = re.search(rf'^{field} = "https://.+/main/(.+)"$', written, re.MULTILINE)[1]
        drawing = (ROOT / path).read_text()
        sides = re.search(r'<svg [^>]*width="(\d+)" height="(\d+)"', drawing).groups()
        assert max(map(int, sides)) <= most and len(drawing) < 8_000


@pytest.mark.slow
def test_the_registrys_archive_holds_what_an_artist_needs():
    """`.comfyignore` has git's syntax."""
    git = ["git", "-C", str(ROOT), "ls-files", "--cached"]
    if subprocess.run(git, capture_output=True).returncode:
        pytest.skip("no git checkout")
    every, left_out = (
        subprocess.run([*git, *more], capture_output=True, text=True, check=True).stdout.split("\n")
        for more in ([], ["--ignored", f"--exclude-from={ROOT / '.comfyignore'}"])
    )
    kept = {name.strip('"') for name in set(every) - set(left_out) if (ROOT / name).is_file()}
    assert not [name for name in kept if name.startswith(("tests/", "benchmarks/", ".ci/"))]
    assert {"__init__.py", "nodes/sample.py", "web/docs/L2PKSampler.md", "LICENSE"} <= kept
    with zipfile.ZipFile(archive := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as packed:
        for name in kept:
            packed.write(ROOT / name, name)
    assert len(archive.getvalue()) < 9_000_000


@pytest.mark.slow
def test_the_package_runs_as_a_program():
    run = subprocess.run(
        [sys.executable, "-m", "comfyui_l2p", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stdout.startswith("usage: l2p")


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


LIGHT_COMMANDS = """
import sys
from comfyui_l2p.l2p_core.cli import main

model, output, image = sys.argv[1:]
for command in (
    ["inspect", model],
    ["export", model, "-o", output],
    ["convert", model, "--patch", "64", "-o", output],
    ["merge", "--trained", model, "--base", model, "-o", output],
    ["generate", "a red circle", "--steps", "1", "--device", "cpu", "-o", image],
):
    assert main(command) == 0
    heavy = {"torch._dynamo", "torch._inductor", "sympy", "transformers"} & sys.modules.keys()
    assert not heavy, (command[0], heavy)
"""


@pytest.mark.slow
def test_what_needs_no_compiler_starts_without_it(tmp_path):
    """torch._dynamo takes half of a start. Quantizing has it from comfy-kitchen, which imports
    it."""
    model, output = BUNDLED_MODEL / "transformer.safetensors", tmp_path / "output.safetensors"
    command = [sys.executable, "-c", LIGHT_COMMANDS, model, output, tmp_path / "image.png"]
    subprocess.run(command, check=True)
