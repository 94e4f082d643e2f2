"""The commands of `l2p`, one module each. Only light modules are imported at the top; torch takes
seconds to import."""
