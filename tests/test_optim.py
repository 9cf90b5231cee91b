"""Optimisers: groups by learning rate, and the course of the rate."""

from typing import Any

import pytest
import torch
from torch import nn

from kit.training.optim import AdamW


def parameters() -> dict[str, nn.Parameter]:
    names = ("transformer.blocks.0.attn1.to_q.lora_A.weight", "audio_proj.proj1.lora_A.weight")
    return {name: nn.Parameter(torch.ones(2, 3)) for name in names}


def rates(optimizer: AdamW, steps: int) -> list[float]:
    made = optimizer.optimizer(parameters())
    schedule = optimizer.schedule(made, steps)
    seen = []
    for _ in range(steps):
        seen.append(made.param_groups[0]["lr"])
        made.step()
        schedule.step()
    return seen


def test_audio_has_a_rate_of_its_own() -> None:
    trained = parameters()
    trunk, audio = AdamW(lr=1e-4, audio_lr=2e-5).groups(trained)
    named = list(trained.values())
    assert (trunk["lr"], audio["lr"]) == (1e-4, 2e-5)
    assert trunk["params"] == [named[0]]
    assert audio["params"] == [named[1]]


def test_without_audio_parameters_there_is_one_group() -> None:
    trunk = dict(list(parameters().items())[:1])
    (group,) = AdamW(lr=3e-4).groups(trunk)
    assert group["lr"] == 3e-4
    assert AdamW(lr=3e-4).audio_lr == 3e-4


def test_warm_up_rises_in_equal_steps_then_stays() -> None:
    seen = rates(AdamW(lr=1.0, warmup_steps=4), 8)
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])


def test_cosine_falls_to_its_final_share() -> None:
    course = AdamW(lr=1.0, warmup_steps=10, course="cosine", final_share=0.2)
    assert course.share(10, 110) == pytest.approx(1.0)
    assert course.share(60, 110) == pytest.approx(0.6)
    assert course.share(110, 110) == pytest.approx(0.2)
    assert course.share(200, 110) == pytest.approx(0.2)
    falling = [course.share(step, 110) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_runs_shorter_than_the_warm_up(steps: int) -> None:
    seen = rates(AdamW(lr=1.0, warmup_steps=10, course="cosine"), steps)
    assert all(0 < rate < 1 for rate in seen)


def test_a_first_step_has_the_size_of_the_rate() -> None:
    trained = parameters()
    optimizer = AdamW(lr=0.1, audio_lr=0.01, weight_decay=0.0).optimizer(trained)
    for parameter in trained.values():
        parameter.grad = torch.full_like(parameter, 5.0)
    optimizer.step()
    trunk, audio = trained.values()
    torch.testing.assert_close(1 - trunk, torch.full((2, 3), 0.1))
    torch.testing.assert_close(1 - audio, torch.full((2, 3), 0.01))


def test_settings_reach_the_optimiser() -> None:
    values: dict[str, Any] = {"betas": [0.8, 0.95], "weight_decay": 0.3}
    made = AdamW(**values).optimizer(parameters())
    assert isinstance(made, torch.optim.AdamW)
    for group in made.param_groups:
        assert group["betas"] == (0.8, 0.95)
        assert group["weight_decay"] == 0.3
