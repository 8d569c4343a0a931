"""How fast the layer is on a GPU: `make bench-gpu`."""
