"""Programs on other machines: ComfyUI servers and their workflows."""
