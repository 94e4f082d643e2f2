"""`python -m comfyui_l2p` is the command `l2p`. So is `python FOLDER` for a copy that is not
installed, such as the node pack in ComfyUI's custom_nodes."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def import_folder() -> None:
    """Import the package that this file lies in as `comfyui_l2p`, whatever the folder's name.

    Python has put the folder on the module path, where its `nodes` would hide other packages."""
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder]
    spec = spec_from_file_location(
        "comfyui_l2p", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    sys.modules["comfyui_l2p"] = package = module_from_spec(spec)
    spec.loader.exec_module(package)


if __name__ == "__main__":
    if not __package__:
        import_folder()
    from comfyui_l2p.l2p_core.cli import program

    program()
