"""The study: what is claimed of batch normalization, measured."""
