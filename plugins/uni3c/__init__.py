"""Move the camera through the picture: Uni3C's controller beside a Wan2.1 base.

    plugins:
      uni3c:
        weights: models/uni3c.safetensors
        trajectory: {azimuth: -30, distance: 0.8}   # or camera: orbit, swing1, free1 and so on
        depth: apple/DepthPro-hf                    # or depth.npy, or Depth Anything's folder

What the controller will be shown can be seen first:

    python -m kit.plugins.uni3c portrait.png --camera orbit --depth depth.npy --out render.mp4

Source: Uni3C, arXiv 2504.14899, and its released code.
"""

from .sampling import Uni3C

plugin = Uni3C
