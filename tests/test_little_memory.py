"""Weights and activations in the memory of the host: the same results, and refused where not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from kit.adapters.lora import Lora
from kit.batch import Batch
from kit.errors import InputError
from kit.run.sample import sample
from kit.training import activations
from kit.training.activations import activations_on_host
from tests.processes import run_together
from tests.test_low_bits import inputs_of
from tests.test_sample import RECIPE as TALK
from tests.test_sample import frames
from tests.test_sample import words as talk
from tests.test_sharded_fit import assert_alike, train, words

FEW = {"trainer.max_steps": 3}
INT8 = {"base.quantise": "int8", "base.full_blocks": "[0]"}


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("world", [1, 2])
def test_offloaded_weights_train_alike(encoded_shards: Path, world: int) -> None:
    offloaded = {**FEW, "trainer.offload": "weights"}
    train(words(encoded_shards, "alone", **FEW, **{"trainer.accumulate": world}))
    run_together(world, train, words(encoded_shards, "offloaded", **offloaded))
    assert_alike("offloaded", "alone")


def test_offloaded_weights_go_on_without_being_offloaded(encoded_shards: Path) -> None:
    train(words(encoded_shards, "alone", **FEW))
    first = {"trainer.max_steps": 2, "trainer.save_every": 1, "trainer.offload": "weights"}
    run_together(1, train, words(encoded_shards, "changing", **first))
    train(words(encoded_shards, "changing", **{**FEW, "trainer.save_every": 1}))
    assert_alike("changing", "alone")


@pytest.mark.parametrize("every", [0, 1])
def test_activations_on_the_host_change_nothing(encoded_shards: Path, every: int) -> None:
    options = {**FEW, "trainer.checkpoint_blocks": every}
    train(words(encoded_shards, "device", **options))
    train(words(encoded_shards, "host", **options, **{"trainer.activations": "host"}))
    assert_alike("host", "device", atol=0.0)


def test_activations_go_to_the_host_and_weights_stay(
    tiny_denoiser: Any, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []

    def move(tensor: Tensor) -> Tensor:
        moved.append(tensor.untyped_storage().data_ptr())
        return tensor.clone()

    hooks = saved_tensors_hooks(lambda tensor: (move(tensor),), lambda packed: packed[0])
    monkeypatch.setattr(activations, "save_on_cpu", lambda pin_memory: hooks)
    denoiser = tiny_denoiser()
    Lora(rank=4).inject(denoiser, seed=0)
    weights = {p.untyped_storage().data_ptr() for p in denoiser.parameters()}
    with activations_on_host():
        loss = denoiser(*inputs_of(batch)).square().mean()
    assert len(moved) > 100
    assert not weights.intersection(moved)
    loss.backward()
    assert all(p.grad is not None for p in denoiser.parameters() if p.requires_grad)


def test_blocks_that_come_and_go_make_the_same_video() -> None:
    two = {"sampling.steps": 2, "sampling.num_frames": 9}
    here = frames(sample(str(TALK), talk(out="here.mp4", **two), print))
    away = {**two, "sampling.offload": "blocks"}
    there = frames(sample(str(TALK), talk(out="there.mp4", **away), print))
    assert (here == there).all()
    assert not torch.distributed.is_initialized()


def test_blocks_in_eight_bits_come_and_go_too() -> None:
    fp8 = {"base.quantise": "fp8", "base.full_blocks": "[0]"}
    here = frames(sample(str(TALK), talk(out="here.mp4", **fp8), print))
    away = {**fp8, "sampling.offload": "blocks"}
    there = frames(sample(str(TALK), talk(out="there.mp4", **away), print))
    assert (here == there).all()


def test_packed_weights_are_not_offloaded(encoded_shards: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.offload: weights in int8 cannot leave"):
        train(words(encoded_shards, "run", **INT8, **{"trainer.offload": "weights"}))
    with pytest.raises(InputError, match=r"sampling\.offload: weights in int8 cannot leave"):
        sample(str(TALK), talk(**INT8, **{"sampling.offload": "blocks"}), print)


def test_what_an_older_recipe_said_of_offload_is_answered_with_what_can_be_said() -> None:
    with pytest.raises(InputError, match=r"sampling\.offload: .*valid: blocks, none, turns"):
        sample(str(TALK), talk(**{"sampling.offload": "true"}), print)
