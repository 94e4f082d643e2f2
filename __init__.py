"""ComfyUI-L2P: L2P checkpoints as a library, the command `l2p`, and (to come) ComfyUI nodes. Importing does nothing."""
