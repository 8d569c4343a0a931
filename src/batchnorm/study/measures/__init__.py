"""What the claims measure and draw: on runs, inside them, and without any."""
