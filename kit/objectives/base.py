"""What the training loop knows of an objective."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from kit.batch import Batch


class Objective(ABC):
    """Turns a batch into named losses; the loop adds them up, or steps an optimiser for each."""

    @abstractmethod
    def losses(self, denoiser: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
        """Compute the losses of one batch.

        Args:
            denoiser: predicts velocity from (noisy, sigma, conditions).
            batch: latents and conditions; dropped conditions are already gone.
            seed: with `batch.draws` it decides all noise.

        Returns:
            Scalars by name.
        """
