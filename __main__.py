"""`python -m comfyui_l2p` is the command `l2p`."""

from .l2p_core.cli import program

if __name__ == "__main__":
    program()
