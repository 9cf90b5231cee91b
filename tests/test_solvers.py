"""Schedules in closed form, and steps that are exact on a straight path."""

import pytest
import torch
from safetensors.torch import load_file

from kit.draws import draw_normal
from kit.solvers import SOLVERS, euler_step, sigma_schedule
from tests.outside import reference


def test_forty_steps_of_infinitetalk() -> None:
    sigmas = sigma_schedule(40, 7.0)
    assert len(sigmas) == 41
    for number, sigma in enumerate(sigmas[:-1].tolist()):
        level = (1000 - number * 999 / 39) / 1000
        assert sigma == pytest.approx(7 * level / (1 + 6 * level), abs=1e-6)
    assert sigmas[[0, -1]].tolist() == [1, 0]
    assert sigmas[-2] == pytest.approx(0.006958, abs=1e-6)


@pytest.mark.parametrize(("steps", "shift"), [(1, 7.0), (2, 1.0), (8, 2.0), (50, 11.0)])
def test_schedules_fall_from_noise_to_clean(steps: int, shift: float) -> None:
    sigmas = sigma_schedule(steps, shift)
    assert sigmas.shape == (steps + 1,)
    assert sigmas[[0, -1]].tolist() == [1, 0]
    assert (sigmas.diff() < 0).all()


@pytest.mark.parametrize("steps", [4, 8, 40])
@pytest.mark.parametrize("shift", [2, 7, 11])
def test_schedules_equal_the_reference(steps: int, shift: int) -> None:
    expected = load_file(reference("utils.safetensors"))[f"outputs/timesteps.{steps}.{shift}"]
    assert (1000 * sigma_schedule(steps, shift) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("name", sorted(SOLVERS))
@pytest.mark.parametrize("level", [1.0, 0.7, 0.01])
def test_a_point_mass_is_reached_in_one_step(name: str, level: float) -> None:
    point, noise, sigma = draw_normal((2, 3), "x"), draw_normal((2, 3), "e"), torch.tensor(level)
    noisy = (1 - sigma) * point + sigma * noise
    velocity = (noisy - point) / sigma
    reached = SOLVERS[name](noisy, velocity, sigma, torch.tensor(0.0))
    torch.testing.assert_close(reached, point)


def test_two_euler_steps_of_one_velocity_are_one() -> None:
    noisy, velocity = draw_normal((4,), "x"), draw_normal((4,), "v")
    high, middle, low = torch.tensor([0.9, 0.4, 0.1])
    twice = euler_step(euler_step(noisy, velocity, high, middle), velocity, middle, low)
    torch.testing.assert_close(twice, euler_step(noisy, velocity, high, low))
