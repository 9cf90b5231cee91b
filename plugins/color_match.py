"""Colour match: each frame gets the colours of the first picture, or of the chunk before.

Every frame is given the mean and spread of another picture's colours, channel by channel. It is
what `sampling.color_correction` does, with a choice of picture and space.

    sampling: {color_correction: 0}
    plugins: {color_match: {reference: previous, space: rgb, strength: 0.5}}

Source: Reinhard et al. 2001, colour transfer between images.
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from kit.sampling.color import match_color
from kit.sampling.continuity import Ends
from kit.sampling.plugin import At, Plugin, Run, Setup


class ColorMatch(Plugin):
    """Moves colours after decoding, before frames become context of the next chunk.

    Args:
        reference: whose colours: those of the `first` picture of the portrait or source video, or
            of the last frame of the `previous` chunk, so that the first chunk decides.
        space: whose channels, `lab` or `rgb`.
        strength: 0 leaves the frames, 1 moves them fully.
    """

    def __init__(
        self,
        *,
        reference: Literal["first", "previous"] = "first",
        space: Literal["lab", "rgb"] = "lab",
        strength: Annotated[float, Field(ge=0, le=1)] = 1.0,
    ) -> None:
        self.reference = reference
        self.space = space
        self.strength = strength

    def problems(self, setup: Setup) -> list[str]:
        """Refuse to move colours twice, and to match a picture that is not there."""
        correction = setup.sampling["color_correction"]
        if not setup.has_reference:
            is_absent = self.reference == "first"
            return ["reference: there is no first picture; take previous"] if is_absent else []
        if correction == 0:
            return []
        return [f"sampling.color_correction: {correction} would move colours a second time; take 0"]

    def open(self, run: Run) -> None:
        """Keep the first picture."""
        self._first = run.scene.source.again().frame(0)

    def ends(self, ends: Ends, tail: Tensor | None, at: At) -> Ends:
        """Keep the last frames of the chunk before."""
        at.shared["tail"] = tail
        return ends

    def pixels(self, pixels: Tensor, at: At) -> Tensor:
        """Move the colours of the whole window."""
        reference, tail = self._first, at.shared["tail"]
        if self.reference == "previous":
            if tail is None:
                return pixels
            reference = tail[:, -1]
        return match_color(pixels, reference.to(pixels), self.strength, self.space)


plugin = ColorMatch
