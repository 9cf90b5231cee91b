"""Move the camera through the picture: Uni3C's controller beside a Wan2.1 base."""
