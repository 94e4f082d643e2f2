"""Several machines: Ray. Nothing here imports it before a function is called."""
