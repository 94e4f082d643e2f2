"""The L2P model, its checkpoints, its sampler and its training. Never imports ComfyUI."""
from .checkpoint import load_model
from .config import L2PConfig
from .header import CheckpointError
from .layout import read_layout
from .model import L2PTransformer
from .pipeline import L2PPipeline

__all__ = ["CheckpointError", "L2PConfig", "L2PPipeline", "L2PTransformer", "load_model", "read_layout"]
