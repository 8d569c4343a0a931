"""What is done to exported models: programs of `torch.export` and ONNX graphs, and their files."""
