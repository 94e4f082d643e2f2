"""Training: what is learned (`loss`), from what (`data`), with which settings (`config`), and the loop (`trainer`)."""
