"""How fast the layer is beside its peers: `batchnorm bench`."""
