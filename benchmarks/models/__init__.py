"""How fast whole models are as they are, and with each of our tools: `make bench-models`."""
