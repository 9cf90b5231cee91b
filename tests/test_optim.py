"""Optimisers: groups by learning rate, and the course of the rate."""

from typing import Any

import pytest
import torch
from torch import nn

from kit.training.muon import Muon, orthogonalized
from kit.training.optim import AdamW, MuonSettings, RateCourse


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
    course = RateCourse(warmup_steps=10, course="cosine", final_share=0.2)
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


@pytest.mark.parametrize("shape", [(6, 40), (40, 6)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.linspace(0.1, 3, shape[1])
    )
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.5 and values.max() < 1.3


def test_muon_steps_convolutions_as_matrices_and_vectors_by_adam() -> None:
    layer = nn.Conv3d(4, 8, 3)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = MuonSettings(lr=0.5, vector_lr=0.1).optimizer(dict(layer.named_parameters()))
    for parameter in layer.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    moved = (layer.weight - before["weight"]).flatten(1)
    values = torch.linalg.svdvals(moved)
    assert values.max() / values.min() < 2.5
    assert layer.bias is not None
    step = (layer.bias - before["bias"]).abs()
    torch.testing.assert_close(step, torch.full_like(step, 0.1))


def test_muon_goes_on_from_its_state() -> None:
    def walk(model: nn.Module, optimizer: Muon, steps: range) -> None:
        for step in steps:
            random = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=random)
            optimizer.step()

    def make() -> tuple[nn.Module, Muon]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        return model, Muon(model.parameters(), 0.1, 0.01, (0.9, 0.98), 0.01)

    whole, optimizer = make()
    walk(whole, optimizer, range(6))
    first, first_optimizer = make()
    walk(first, first_optimizer, range(3))
    second, second_optimizer = make()
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    walk(second, second_optimizer, range(3, 6))
    for one, other in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
