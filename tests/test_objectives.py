"""What every objective promises: it can be learnt, it repeats, it leaves context alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kit.batch import Batch
from kit.draws import draw_normal
from kit.objectives import OBJECTIVES
from kit.objectives.base import Objective
from kit.objectives.flow_matching import (
    FlowMatching,
    draw_noise,
    loss_outside_context,
    noisy_latents,
)
from kit.registry import load


@pytest.fixture(params=sorted(OBJECTIVES), scope="module")
def objective(request: pytest.FixtureRequest) -> Objective:
    built = load(OBJECTIVES[request.param])()
    assert isinstance(built, Objective)
    return built


class Recorder(nn.Module):
    """A denoiser that predicts zero and keeps what it was shown."""

    def forward(self, noisy: Tensor, sigma: Tensor, conditions: object) -> Tensor:
        self.noisy, self.sigma = noisy, sigma
        return torch.zeros_like(noisy)


def of_epoch(batch: Batch, epoch: int) -> Batch:
    draws = batch.draws.clone()
    draws[:, 0] = epoch
    return replace(batch, draws=draws)


def levels(objective: FlowMatching, batch: Batch, count: int = 700) -> Tensor:
    return torch.cat([objective.draw_sigma(of_epoch(batch, i), seed=0) for i in range(count)])


def test_a_few_steps_lower_the_loss(
    objective: Objective, tiny_denoiser: Callable[[], nn.Module], batch: Batch
) -> None:
    denoiser = tiny_denoiser().requires_grad_(True)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=1e-3)
    seen = []
    for _ in range(8):
        loss = torch.stack(list(objective.losses(denoiser, batch, seed=0).values())).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.9 * seen[0]


def test_the_seed_and_the_draws_decide_the_loss(
    objective: Objective, tiny_denoiser: Callable[[], nn.Module], batch: Batch
) -> None:
    denoiser = tiny_denoiser()

    def losses(used: Batch, seed: int) -> list[float]:
        with torch.no_grad():
            return [float(loss) for loss in objective.losses(denoiser, used, seed).values()]

    torch.manual_seed(1)
    first = losses(batch, 0)
    torch.manual_seed(2)
    assert losses(batch, 0) == first
    assert losses(batch, 1) != first
    assert losses(of_epoch(batch, 7), 0) != first


def test_losses_are_float32_scalars(objective: Objective, batch: Batch) -> None:
    rounded = batch.to(torch.device("cpu"), torch.bfloat16)
    for loss in objective.losses(Recorder(), rounded, seed=0).values():
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        assert loss.isfinite()


def test_context_is_shown_clean(objective: Objective, batch: Batch) -> None:
    recorder = Recorder()
    objective.losses(recorder, batch, seed=0)
    for noisy, latents, count in zip(
        recorder.noisy, batch.latents, batch.num_context.tolist(), strict=True
    ):
        assert count > 0
        assert torch.equal(noisy[:, :count], latents[:, :count])
        assert not torch.isclose(noisy[:, count:], latents[:, count:]).all()


def test_context_is_kept_out_of_the_loss() -> None:
    target, num_context = draw_normal((2, 3, 4, 2, 2), "v"), torch.tensor([1, 3])
    velocity = target + 2
    expected = loss_outside_context(velocity, target, num_context)
    velocity[0, :, :1] += 100
    velocity[1, :, :3] += 100
    assert loss_outside_context(velocity, target, num_context) == expected
    assert expected == pytest.approx(4, rel=1e-5)


def test_samples_count_alike_whatever_their_context() -> None:
    target = torch.zeros(2, 1, 4, 1, 1)
    velocity = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1).expand_as(target)
    assert loss_outside_context(velocity, target, torch.tensor([0, 3])) == 5


def test_a_perfect_prediction_has_no_loss(batch: Batch) -> None:
    target = draw_noise(batch, seed=0) - batch.latents

    class Knowing(nn.Module):
        def forward(self, noisy: Tensor, sigma: Tensor, conditions: object) -> Tensor:
            return target

    assert FlowMatching().losses(Knowing(), batch, seed=0)["velocity"] == 0


def test_noise_belongs_to_the_sample_not_to_its_place(batch: Batch) -> None:
    noise = draw_noise(batch, seed=0)
    alone = replace(batch, draws=batch.draws[1:2], latents=batch.latents[1:2])
    assert torch.equal(draw_noise(alone, seed=0)[0], noise[1])
    assert not torch.equal(noise[0], noise[1])


def test_levels_mix_latents_and_noise(batch: Batch) -> None:
    noise = draw_noise(batch, seed=0)
    free = replace(batch, num_context=torch.zeros(3, dtype=torch.long))
    mixed = noisy_latents(free, noise, torch.tensor([0.0, 0.5, 1.0]))
    torch.testing.assert_close(mixed[0], batch.latents[0])
    torch.testing.assert_close(mixed[1], (batch.latents[1] + noise[1]) / 2)
    torch.testing.assert_close(mixed[2], noise[2])


@pytest.mark.parametrize(("shift", "median"), [(1.0, 0.5), (3.0, 0.75), (7.0, 0.875)])
@pytest.mark.parametrize("sigma", ["uniform", "logit_normal"])
def test_levels_have_the_median_of_their_shift(
    batch: Batch, sigma: str, shift: float, median: float
) -> None:
    objective = FlowMatching(sigma=sigma, shift=shift)  # type: ignore[arg-type]
    drawn = levels(objective, batch)
    assert 0 < drawn.min() and drawn.max() < 1
    assert drawn.median() == pytest.approx(median, abs=0.03)


def test_logit_normal_levels_gather_at_their_mean(batch: Batch) -> None:
    wide = levels(FlowMatching(sigma="uniform", shift=1.0), batch)
    narrow = levels(FlowMatching(sigma="logit_normal", shift=1.0, logit_std=0.3), batch)
    high = levels(FlowMatching(sigma="logit_normal", shift=1.0, logit_mean=1.0), batch)
    assert wide.std() == pytest.approx(12**-0.5, abs=0.02)
    assert narrow.std() < 0.1
    assert high.median() == pytest.approx(0.731, abs=0.03)
