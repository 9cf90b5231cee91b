"""The plugin: Uni3C's controller in a sampling run."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from kit.batch import Conditions
from kit.errors import InputError
from kit.flow import add_noise
from kit.models.base import Denoiser, Geometry
from kit.models.inside import Entry, Update
from kit.models.wan import Wan
from kit.recipe import ExistingFile
from kit.sampling.continuity import Ends
from kit.sampling.frames import VideoSource
from kit.sampling.plugin import At, Gate, Plugin, Run, Setup

from .cameras import PRESETS, Trajectory
from .controller import CELL, Control, Controller
from .depth import measure_depth, require_depth
from .renders import GUIDE_CHANNELS, DrivingVideo, Renders, TravellingCamera
from .weights import load_controller, open_controller

Preset = Literal["free1", "free2", "free3", "free4", "free5", "orbit", "swing1", "swing2"]

USELESS = {
    "trajectory": ("video",),
    "video": ("camera", "trajectory", "depth", "frames", "radius"),
}
"""Options that a source of renders would pass over."""


class Uni3C(Plugin):
    """Adds what the controller says to the video tokens behind each of the base's first blocks.

    The controller sees neither text nor speech, so it is asked once a step for all branches. No
    list of residuals is kept. The public one takes 2.0 GB; for 480x768 pixels and 81 frames, what
    it makes of the render takes 0.3 GB through a chunk and 1.7 GB for a moment at its beginning;
    within a step 0.6 GB come and go, or 1.8 GB where branches are asked one by one, since its 20
    states are kept for the next one. This is computed, for bfloat16.

    Args:
        weights: of the controller: the public file, one that others renamed, or one of your own.
        source: of the render. `trajectory` shows the run's first picture along a course of
            cameras, as the controller was trained. `video` takes a video for a render, cut to the
            run's length, its last picture held behind its end. Controllers are not made for that,
            and it may work or not; its first picture should be the reference. A portrait then
            holds the camera still.
        camera: name of a course, in place of `trajectory`.
        trajectory: a course of your own, by where it ends: `{azimuth: -30, distance: 0.8}`.
        depth: of the first picture: a file, or a folder or hub repository of a network.
        field_of_view: degrees across the picture, if `depth` does not tell the focal length.
        radius: how far away the centre is, round which the camera turns, in the unit of `depth`;
            without it, as far as what stands in the middle of the picture.
        frames: in which the camera goes its way, then it stays; without it, the whole video.
        anchor: what chunks behind the first see: `global` goes on through the first picture, whose
            holes become larger; `chunk` begins with the frame made last for its time, which also
            becomes its reference, and whose depth a network must tell.
        video: for `source: video`; without it, the run's own video or portrait.
        strength: factor of what is added; 0 changes nothing.
        start: where it begins.
        end: where it ends; for `source: video`, 0.1 to 0.2 are usual.
        unit: of these two, shares of the steps or noise levels.
        context: what the controller sees of frames that the base is given: `clean` as the base
            does, or `renoised` to the level of the step, as all frames were when the public one
            was trained.
        mask_and_camera: False hides holes and rays, as ComfyUI does; that is not the same as
            zeros.
    """

    def __init__(
        self,
        *,
        weights: ExistingFile,
        source: Literal["trajectory", "video"] = "trajectory",
        camera: Preset | None = None,
        trajectory: Trajectory | None = None,
        depth: str | None = None,
        field_of_view: Annotated[float, Field(gt=0, lt=180)] = 50.0,
        radius: Annotated[float, Field(gt=0)] | None = None,
        frames: Annotated[int, Field(ge=1)] | None = None,
        anchor: Literal["global", "chunk"] = "global",
        video: ExistingFile | None = None,
        strength: Annotated[float, Field(ge=0)] = 1.0,
        start: Annotated[float, Field(ge=0, le=1)] = 0.0,
        end: Annotated[float, Field(ge=0, le=1)] = 0.5,
        unit: Literal["step", "sigma"] = "step",
        context: Literal["clean", "renoised"] = "clean",
        mask_and_camera: bool = True,
    ) -> None:
        self.weights = Path(weights)
        self.source = source
        self.camera = camera
        self.trajectory = trajectory
        self.depth = depth
        self.field_of_view = field_of_view
        self.radius = radius
        self.frames = frames
        self.anchor = anchor
        self.video = None if video is None else Path(video)
        self.strength = strength
        self.gate = Gate(start, end, unit)
        self.context = context
        self.mask_and_camera = mask_and_camera
        self._controller: Controller | None = None

    def problems(self, setup: Setup) -> list[str]:
        """List options that do not go together, and what does not fit the base or the picture."""
        found = self._option_problems() + self.gate.problems(setup)
        if not setup.has_reference:
            found.append("there is no picture to move in: the run has neither image nor video")
        if self.depth is not None:
            found += _errors_of(partial(require_depth, self.depth, setup.size))
        return found + _errors_of(partial(_require_fit, self.weights, setup.denoiser))

    def _option_problems(self) -> list[str]:
        found = [
            f"{name}: source: {self.source} has no use for it; leave it out"
            for name in USELESS[self.source]
            if getattr(self, name) is not None
        ]
        if self.source == "video":
            useless = ["anchor: chunk is for source: trajectory"]
            return found + (useless if self.anchor == "chunk" else [])
        if (self.camera is None) == (self.trajectory is None):
            found.append("camera, trajectory: give one of them, and only one")
        if self.depth is None:
            found.append("depth: missing; a file, or a network of transformers")
        elif self.anchor == "chunk" and Path(self.depth).is_file():
            found.append(
                f"anchor: chunk needs a network that tells the depth of pictures yet to be made; "
                f"'{self.depth}' tells that of one"
            )
        return found

    def open(self, run: Run) -> None:
        """Remember the run; what is rendered is known when the device is."""
        self._run = run
        self._renders: Renders | None = None

    def ends(self, ends: Ends, tail: Tensor | None, at: At) -> Ends:
        """Begin anew from the frame that the chunk before made for the first of this one."""
        if self.anchor == "global" or tail is None:
            return ends
        at.shared["picture"] = tail[:, 0]
        return Ends(tail[:, 0], ends.last)

    def conditions(self, conditions: Conditions, at: At) -> Conditions:
        """Render the chunk and encode it as a clip of its own, since the encoder is causal."""
        if self._renders is None:
            self._renders = self._open_renders(conditions.reference.device)
        shown = self._renders.show(at.chunk, at.shared.get("picture"))
        at.shared["render"] = self._run.encoders.encode_video(shown.pixels[None])
        at.shared["guide"] = shown.guide[None] if self.mask_and_camera else None
        return conditions

    def noise(self, noise: Tensor, at: At) -> Tensor:
        """Remember the noise of context frames."""
        at.shared["noise"] = noise
        return noise

    def is_active(self, at: At) -> bool:
        """Open between `start` and `end`."""
        return self.strength > 0 and self.gate.is_open(at)

    def branches(self, branches: dict[str, Conditions], at: At) -> dict[str, Conditions]:
        """Count who will share a step."""
        at.shared["num_branches"] = len(branches)
        return branches

    def embed(self, x: Tensor, rotation: Tensor, entry: Entry, at: At) -> tuple[Tensor, Tensor]:
        """Show the controller the latents, unless it was asked about them for another branch."""
        shared, controller = at.shared, self._controller_like(x)
        if "render" in shared:
            guide, render = shared.pop("guide"), shared.pop("render").to(x)
            guide = guide if guide is None else guide.to(x)
            shared["rendered"] = controller.embed_render(render, guide)
        noisy, time = self._seen(entry.noisy[:1], at), entry.time[:1]
        asked, shared["asked"] = shared.get("asked"), (noisy, time)
        if asked is None or not all(map(torch.equal, asked, shared["asked"])):
            shared["control"] = Control(
                controller,
                shared["rendered"],
                noisy,
                time,
                strength=self.strength,
                remember=len(at.branches) < shared["num_branches"],
            )
        return x, rotation

    def block(self, update: Update, number: int, x: Tensor, entry: Entry, at: At) -> Tensor:
        """Add what the controller says behind this block."""
        control: Control = at.shared["control"]
        return control.after(number, update(x))

    def step(self, noisy: Tensor, at: At) -> Tensor:
        """Free what the branches of the step shared."""
        at.shared.pop("asked", None)
        at.shared.pop("control", None)
        return noisy

    def _open_renders(self, device: torch.device) -> Renders:
        source = self._run.scene.source.again()
        picture = source.frame(0)
        if self.source == "video":
            if self.video is None:
                return DrivingVideo(source.again())
            size = (picture.shape[1], picture.shape[2])
            return DrivingVideo(VideoSource(self.video, size, Geometry().fps))
        route = self.trajectory if self.camera is None else PRESETS[self.camera]
        assert route is not None and self.depth is not None
        return TravellingCamera(
            picture.to(device),
            partial(measure_depth, self.depth),
            route,
            self.frames or self._run.encoded.num_frames,
            field_of_view=self.field_of_view,
            radius=self.radius,
        )

    def _controller_like(self, x: Tensor) -> Controller:
        """Give the controller where the base computes, and as it does."""
        if self._controller is None:
            self._controller = load_controller(self.weights, x.device, x.dtype)
        return self._controller

    def _seen(self, noisy: Tensor, at: At) -> Tensor:
        """Give what the controller sees of the latents and the mask. [1, C + 4, F, H, W]"""
        if self.context == "clean":
            return noisy
        noise = at.shared["noise"].to(noisy)
        num_channels, num_context = noise.shape[1], 1 + max(at.chunk.num_context - 1, 0) // CELL[0]
        context = (slice(None), slice(num_channels), slice(num_context))
        seen = noisy.clone()
        seen[context] = add_noise(noisy[context], noise[context], noise.new_tensor([at.sigma]))
        return seen


def _require_fit(weights: Path, base: Denoiser) -> None:
    """Compare a controller with a base, without reading any tensor."""
    sizes = open_controller(weights)[0].sizes
    assert isinstance(base, Wan)
    patch, num_blocks = base.transformer.patch_embedding, len(base.blocks())
    pairs = {
        "width": (sizes.base_dim, patch.out_channels),
        "width of the time embedding": (sizes.time_dim, patch.out_channels),
        "channels of the input": (sizes.in_channels, patch.in_channels),
        "channels of holes and rays": (sizes.guide_channels, GUIDE_CHANNELS),
        "blocks": (sizes.num_layers, min(sizes.num_layers, num_blocks)),
    }
    wrong = [f"{name} {its}, not {ours}" for name, (its, ours) in pairs.items() if its != ours]
    if wrong:
        raise InputError(f"weights: '{weights}' is for another base: {'; '.join(wrong)}")


def _errors_of(check: Callable[[], None]) -> list[str]:
    try:
        check()
    except InputError as error:
        return [str(error)]
    return []
