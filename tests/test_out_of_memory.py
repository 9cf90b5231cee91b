"""Memory runs out: the next option of the recipe's list is taken, and no finished step is lost."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kit.batch import Batch
from kit.devices import is_out_of_memory
from kit.errors import InputError
from kit.models.encoders import VideoEncoder
from kit.models.wan import Wan
from kit.objectives.flow_matching import FlowMatching
from kit.run.sample import sample
from tests.processes import run_together
from tests.test_sample import RECIPE as TALK
from tests.test_sample import frames
from tests.test_sample import words as talk
from tests.test_sharded_fit import STEPS, assert_alike, course, train, words

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 3 GiB"
LADDER = "[trainer.checkpoint_blocks=1,trainer.activations=host]"

Fits = Callable[[Wan], bool]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def limit(patch: pytest.MonkeyPatch, fits: Fits, *, first: int = 0) -> None:
    """Let memory run out in every batch from `first` on for which there is not enough.

    Args:
        patch: undoes it.
        fits: tells whether a denoiser needs no more than there is.
        first: number of the batch, of those that are asked for.
    """
    exact, asked = FlowMatching.losses, list[int]()

    def limited(self: FlowMatching, denoiser: Wan, batch: Batch, seed: int) -> dict[str, Tensor]:
        asked.append(len(asked))
        if asked[-1] >= first and not fits(denoiser):
            raise torch.OutOfMemoryError(MESSAGE)
        return exact(self, denoiser, batch, seed)

    patch.setattr(FlowMatching, "losses", limited)


def recomputes(denoiser: Wan) -> bool:
    return all(block.recomputes for block in denoiser.transformer.blocks)


def saves_elsewhere(denoiser: Wan) -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def never(denoiser: Wan) -> bool:
    return False


def test_a_run_goes_on_behind_its_last_step(
    encoded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second batch of a step, behind one that no checkpoint was due at."""
    options = {"trainer.accumulate": 2, "when_out_of_memory": LADDER}
    train(words(encoded_shards, "enough", **options))
    with monkeypatch.context() as patch:
        limit(patch, recomputes, first=9)
        told = train(words(encoded_shards, "short", **options))
    assert_alike("short", "enough")
    assert course("short", "step") == [float(step) for step in range(1, STEPS + 1)]
    words_told = "\n".join(told)
    assert "CUDA out of memory. Tried to allocate 2.00 GiB.; going on with trainer.ch" in words_told
    assert "total capacity" not in words_told
    assert "going on from runs/short/checkpoints/step-00000004.ckpt" in words_told


def test_words_are_used_in_order_and_remembered(
    encoded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"when_out_of_memory": LADDER}
    train(words(encoded_shards, "enough", **options))
    with monkeypatch.context() as patch:
        limit(patch, lambda denoiser: recomputes(denoiser) and saves_elsewhere(denoiser), first=2)
        part = {**options, "trainer.max_steps": 4}
        told = train(words(encoded_shards, "short", **part))
        steps = [line.rpartition(" ")[2] for line in told if "; going on with" in line]
        assert steps == LADDER.strip("[]").split(",")
        told = train(words(encoded_shards, "short", **options))
        assert not any("; going on with" in line for line in told)
    assert told[0].startswith("runs/short/out_of_memory.txt: memory ran out before; trainer.ch")
    assert_alike("short", "enough")


def test_weights_that_were_half_changed_are_not_kept(
    encoded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out inside of the fourth update; the second was the last that was saved."""
    options = {"trainer.save_every": 2, "when_out_of_memory": LADDER}
    train(words(encoded_shards, "enough", **options))
    exact, calls = torch.optim.AdamW.step, list[int]()

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        calls.append(len(calls))
        found = exact(self, closure)
        if len(calls) == 4:
            raise torch.OutOfMemoryError(MESSAGE)
        return found

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    told = train(words(encoded_shards, "short", **options))
    assert "going on from runs/short/checkpoints/step-00000002.ckpt" in told
    assert_alike("short", "enough")


def test_when_nothing_is_left_the_step_before_is_saved_and_what_helps_is_told(
    encoded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(words(encoded_shards, "enough"))
    with monkeypatch.context() as patch:
        limit(patch, never, first=4)
        with pytest.raises(InputError, match=r"memory ran out: CUDA .*\n.*trainer\.activations="):
            train(words(encoded_shards, "short"))
    told = train(words(encoded_shards, "short", **{"trainer.activations": "host"}))
    assert "going on from runs/short/checkpoints/step-00000004.ckpt" in told
    assert_alike("short", "enough")


def train_short(given: list[str]) -> list[str]:
    """Train in one of several processes, of which the second has too little memory."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            limit(patch, recomputes, first=4)
        return train(given)


def test_several_processes_start_again_with_the_same_word(encoded_shards: Path) -> None:
    options = {"when_out_of_memory": LADDER}
    run_together(2, train, words(encoded_shards, "enough", **options))
    given = words(encoded_shards, "short", **options)
    with pytest.raises(AssertionError, match=r"process [01]:"):
        run_together(2, train_short, given)
    assert Path("runs/short/out_of_memory.txt").read_text() == "trainer.checkpoint_blocks=1\n"
    told = run_together(2, train_short, given)
    assert all("memory ran out before; trainer.checkpoint_blocks=1" in lines[0] for lines in told)
    assert_alike("short", "enough")


def test_other_errors_stay_what_they_are(
    encoded_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*given: object) -> dict[str, Tensor]:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(FlowMatching, "losses", wrong)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(words(encoded_shards, "run", **{"when_out_of_memory": LADDER}))
    assert not Path("runs/run/out_of_memory.txt").exists()


def test_what_allocators_say_is_understood() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 58, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("no room"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


BAD = {
    "trainer.batch=1": r"when_out_of_memory: unknown 'trainer\.batch'.*trainer\.activations",
    "trainer.activations=hots": r"when_out_of_memory: trainer\.activations.*host",
    "trainer.offload": r"when_out_of_memory: 'trainer\.offload': write it as key=value",
    "trainer.offload=weights,base.quantise=nf4": "when_out_of_memory: unknown 'base.quantise'",
}


@pytest.mark.parametrize("list_", BAD)
def test_a_list_that_cannot_be_used_is_refused_at_the_door(
    encoded_shards: Path, list_: str
) -> None:
    with pytest.raises(InputError, match=BAD[list_]):
        train(words(encoded_shards, "run", **{"when_out_of_memory": f"[{list_}]"}))
    assert not Path("runs").exists()


def test_what_does_not_go_together_is_refused_at_the_door(encoded_shards: Path) -> None:
    options = {"base.quantise": "int8", "base.full_blocks": "[0]"}
    given = words(encoded_shards, "run", **options, when_out_of_memory="[trainer.offload=weights]")
    with pytest.raises(InputError, match=r"when_out_of_memory: trainer\.offload: weights in int8"):
        train(given)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Too little memory for several branches at once and for decoding whole frames."""
    exact, decode, made = Wan.forward, VideoEncoder.decode, list[str]()

    def forward(self: Wan, noisy: Tensor, *given: Any, **more: Any) -> Tensor:
        if len(noisy) > 1 and len(made) >= 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return exact(self, noisy, *given, **more)

    def decode_some(self: VideoEncoder, latents: Tensor) -> Tensor:
        if len(made) >= 1 and self._decode == self.vae.decode:
            raise torch.OutOfMemoryError(MESSAGE)
        made.append("chunk")
        return decode(self, latents)

    monkeypatch.setattr(Wan, "forward", forward)
    monkeypatch.setattr(VideoEncoder, "decode", decode_some)
    yield made


LADDER_OF_SAMPLING = "[sampling.together=false,base.decode_tile=64]"


def test_a_video_goes_on_with_the_chunk_that_failed(short_of_memory: list[str]) -> None:
    told: list[str] = []
    given = talk(when_out_of_memory=LADDER_OF_SAMPLING)
    out = sample(str(TALK), given, told.append)
    assert [line.rpartition(" ")[2] for line in told if "; going on with" in line] == [
        "sampling.together=false",
        "base.decode_tile=64",
    ]
    assert told.count("talk.partial: 1 of 4 chunks are there") == 2
    assert len(short_of_memory) == 4
    assert len(frames(out)) == 20
    assert [path.name for path in Path().iterdir() if "memory" in path.name] == []


def test_a_video_without_a_list_says_what_helps(short_of_memory: list[str]) -> None:
    with pytest.raises(InputError, match=r"when_out_of_memory can have sampling\.together=false"):
        sample(str(TALK), talk(), print)
    told: list[str] = []
    more = {"sampling.together": "false", "when_out_of_memory": "[base.decode_tile=64]"}
    sample(str(TALK), talk(**more), told.append)
    assert "talk.partial: 1 of 4 chunks are there" in told
