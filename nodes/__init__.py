"""ComfyUI nodes, thin adapters over `l2p_core` and `quant`; the only floor that imports ComfyUI."""
