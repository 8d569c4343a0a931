"""What runs on the GPU. Importing it needs Triton: only `device` does, inside a function."""
