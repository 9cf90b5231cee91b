"""Training a controller beside a frozen denoiser; `kit pretrain` finds it by `task` and `data`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from kit.draws import draw_uniform, seed_of
from kit.flow import velocity_target
from kit.models.inside import Entry, Untouched, Update, run_all
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.objectives.flow_matching import (
    FlowMatching,
    draw_noise,
    loss_outside_context,
    noisy_latents,
)
from kit.pretraining.base import PartTask
from kit.recipe import ExistingFolder
from kit.training.dropout import ConditionDropout

from .controller import Control, Controller, Rendered, Sizes
from .examples import ControlBatch, Examples
from .renders import GUIDE_CHANNELS
from .weights import NUM_HEADS

FILE = "uni3c.safetensors"

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Controlled(Untouched):
    """Lets a controller add to the tokens behind each block.

    Args:
        controller: the network.
        rendered: what it sees of the render.
    """

    def __init__(self, controller: Controller, rendered: Rendered) -> None:
        self._controller = controller
        self._rendered = rendered

    def enter(self, x: Tensor, rotation: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
        """Show the controller the noisy latents and their level."""
        self._control = Control(self._controller, self._rendered, entry.noisy, entry.time)
        return x, rotation

    def run(self, blocks: Sequence[Update], x: Tensor) -> Tensor:
        """Run the blocks, each with what is added behind it."""
        return run_all([partial(self._after, *numbered) for numbered in enumerate(blocks)], x)

    def _after(self, number: int, block: Update, x: Tensor) -> Tensor:
        return self._control.after(number, block(x))


class ControllerTask(PartTask):
    """Trains a new controller beside a frozen denoiser, by flow matching.

    Args:
        seed: of the first weights and of all random choices.
        base: folder of the base.
        text_length: text tokens that its network sees.
        dim: width of the controller.
        ffn_dim: width inside its feed-forward layers.
        num_heads: of its attention.
        num_layers: its blocks; the paper takes half as many as the base has.
        guide_dim: width of the layer behind holes and rays, a multiple of 8.
        shift: moves the noise levels, which are drawn from a logit-normal, towards noise.
        drop_text: share of samples without their caption.
        drop_audio: share without their speech.
        drop_render: share that see an empty render.
        drop_rays: share whose cameras are not told.

    Source: Uni3C, section 3; text is dropped in 10 %, renders and rays in 5 % of samples.
    """

    def __init__(
        self,
        seed: int,
        *,
        base: ExistingFolder,
        text_length: Count = 512,
        dim: Count = 1024,
        ffn_dim: Count = 4096,
        num_heads: Count = 16,
        num_layers: Count = 20,
        guide_dim: Annotated[int, Field(ge=8, multiple_of=8)] = 256,
        shift: Annotated[float, Field(gt=0)] = 3.0,
        drop_text: Share = 0.1,
        drop_audio: Share = 0.1,
        drop_render: Share = 0.05,
        drop_rays: Share = 0.05,
    ) -> None:
        self._seed = seed
        self._objective = FlowMatching(sigma="logit_normal", shift=shift)
        self._dropout = ConditionDropout(text=drop_text, audio=drop_audio, image=0.0, reference=0.0)
        self._drop_render, self._drop_rays = drop_render, drop_rays
        whole = WanBase(path=base, dtype="float32", text_length=text_length)
        denoiser = whole.load_denoiser(torch.device("cpu"))
        assert isinstance(denoiser, Wan)
        patch = denoiser.transformer.patch_embedding
        torch.manual_seed(seed_of(seed, "weights"))
        sizes = Sizes(
            in_channels=patch.in_channels,
            guide_channels=GUIDE_CHANNELS,
            guide_dim=guide_dim,
            base_dim=patch.out_channels,
            time_dim=patch.out_channels,
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=num_heads,
            num_layers=num_layers,
        )
        self._controller = Controller(sizes)
        # Render channels stand where the base has its reference, so its patches are a good start.
        self._controller.controlnet_patch_embedding.load_state_dict(patch.state_dict())
        self._denoiser = denoiser
        self._network = nn.ModuleDict({"controller": self._controller, "denoiser": denoiser})

    @property
    def network(self) -> nn.Module:
        """The controller, which trains, and the denoiser, which is frozen."""
        return self._network

    def losses(self, batch: ControlBatch) -> dict[str, Tensor]:
        """Compute the loss of the velocity outside of the context."""
        given = self._dropout.drop(batch.batch, self._seed)
        sigma = self._objective.draw_sigma(given, self._seed)
        noise = draw_noise(given, self._seed)
        noisy = noisy_latents(given, noise, sigma)
        rendered = self._controller.embed_render(*self.told(batch))
        inside = Controlled(self._controller, rendered)
        velocity = self._denoiser(noisy, sigma, given.conditions, inside=inside)
        target = velocity_target(given.latents, noise)
        return {"velocity": loss_outside_context(velocity, target, given.num_context)}

    def told(self, batch: ControlBatch) -> tuple[Tensor, Tensor]:
        """Give renders and guides, some dropped: an empty render is one large hole."""
        holes, rays = batch.guide[:, :1], batch.guide[:, 1:]
        is_empty = self._drawn(batch, "render", self._drop_render)
        is_untold = self._drawn(batch, "rays", self._drop_rays)
        render = batch.render.masked_fill(is_empty, 0)
        guide = [holes.masked_fill(is_empty, 1), rays.masked_fill(is_untold, 0)]
        return render, torch.cat(guide, dim=1)

    def names(self, batch: ControlBatch) -> tuple[list[str], list[list[int]]]:
        """Name the samples of a batch."""
        return list(batch.batch.keys), batch.batch.draws.tolist()

    def finish(self, batches: list[ControlBatch]) -> None:
        """Measure nothing."""

    def save(self, folder: Path) -> None:
        """Write the controller in half precision, by the released names."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: value.detach().half().contiguous()
            for name, value in self._controller.state_dict().items()
        }
        heads = str(self._controller.sizes.num_heads)
        save_file(tensors, folder / FILE, metadata={"format": "pt", NUM_HEADS: heads})

    def _drawn(self, batch: ControlBatch, name: str, share: float) -> Tensor:
        draws = batch.batch.draws.tolist()
        drawn = [draw_uniform(self._seed, *draw, "drop", name) < share for draw in draws]
        return torch.tensor(drawn, device=batch.render.device).view(-1, 1, 1, 1, 1)


task, data = ControllerTask, Examples
