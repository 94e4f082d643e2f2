"""The web page and the HTTP API, `l2p serve`. Needs the extra: pip install 'comfyui-l2p[serve]'."""
