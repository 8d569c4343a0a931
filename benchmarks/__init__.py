"""Benchmarks: how fast the layer is beside its peers."""
