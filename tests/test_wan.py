"""The denoiser: parity with the reference program, batching, precision and gradients."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from kit.batch import Conditions
from kit.draws import draw_normal
from kit.errors import InputError
from kit.masks import check_speaker_masks
from kit.models.attention import grid_rotation, rotate
from kit.models.audio import AudioProjector, AudioSizes, band_starts
from kit.models.checkpoints import draw_weights
from kit.models.keys import our_name
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.reference import first_frame_mask
from tests.outside import reference

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
SIGMA = torch.tensor([0.3, 0.9, 0.6])


@pytest.fixture(scope="module")
def wan() -> Wan:
    base = WanBase(path=str(TINY_BASE), random_weights=1, dtype="float32")
    model = base.load_denoiser(torch.device("cpu"))
    assert isinstance(model, Wan)
    return model


def make_conditions(num_speakers: list[int], num_latent_frames: int = 3) -> Conditions:
    batch, slots = len(num_speakers), max(num_speakers)
    masks = torch.zeros(batch, slots, 8, 8)
    audio = draw_normal((batch, slots, 4 * num_latent_frames - 3, 5, 3, 32), 4)
    for sample, count in enumerate(num_speakers):
        audio[sample, count:] = 0
        for speaker in range(count):
            masks[sample, speaker, 2:, 2 * speaker : 2 * speaker + 2] = 1
    return Conditions(
        text=draw_normal((batch, 7, 32), 1),
        image=draw_normal((batch, 17, 32), 2),
        reference=draw_normal((batch, 16, num_latent_frames, 8, 8), 3),
        reference_mask=first_frame_mask(batch, num_latent_frames),
        audio=audio,
        num_speakers=torch.tensor(num_speakers),
        speaker_masks=masks,
    )


def make_noisy(batch: int, num_latent_frames: int = 3) -> Tensor:
    return draw_normal((batch, 16, num_latent_frames, 8, 8), 5)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", ["single", "double"])
def test_equals_the_reference_program(case: str) -> None:
    path = reference(f"dit_{case}.safetensors")
    with safe_open(path, "pt") as reader:
        sizes = json.loads(reader.metadata()["meta"])["config"]
    tensors = load_file(path)
    model = Wan(
        {
            "num_attention_heads": sizes["num_heads"],
            "attention_head_dim": sizes["dim"] // sizes["num_heads"],
            "in_channels": 36,
            "text_dim": sizes["text_dim"],
            "freq_dim": sizes["freq_dim"],
            "ffn_dim": sizes["ffn_dim"],
            "num_layers": sizes["num_layers"],
            "image_dim": 1280,
            "added_kv_proj_dim": sizes["dim"],
        },
        audio=AudioSizes(
            intermediate_dim=sizes["intermediate_dim"],
            output_dim=sizes["output_dim"],
            context_tokens=sizes["context_tokens"],
        ),
    )
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k}
    model.load_state_dict({our_name(key) or key: value for key, value in weights.items()})
    num_speakers = len(tensors["inputs/audio"])
    conditions = Conditions(
        text=tensors["inputs/text"][None],
        image=tensors["inputs/clip"],
        reference=tensors["inputs/cond"][:, 4:],
        reference_mask=tensors["inputs/cond"][:, :4, :, 0, 0],
        audio=tensors["inputs/audio"][None],
        num_speakers=torch.tensor([num_speakers]),
        speaker_masks=tensors["inputs/masks"][None, :num_speakers],
    )
    with torch.no_grad():
        velocity = model(
            tensors["inputs/latent"][None], tensors["inputs/timestep"] / 1000, conditions
        )[0]
    expected = tensors["outputs/velocity"]
    assert relative(velocity, expected) < 1e-5
    assert (velocity - expected).abs().max() < 5e-5


def test_without_audio_it_is_the_network_of_diffusers(wan: Wan) -> None:
    silent = Wan(wan.transformer.config, audio=AudioSizes(3, 32, 16, 32, 4))
    silent.load_state_dict(wan.state_dict())
    plain = WanTransformer3DModel.from_config(dict(wan.transformer.config))
    names = set(plain.state_dict())
    trunk = {name: v for name, v in wan.transformer.state_dict().items() if name in names}
    plain.load_state_dict(trunk)
    for block in silent.transformer.blocks:
        nn.init.zeros_(block.audio_cross_attn.proj.weight)
        nn.init.zeros_(block.audio_cross_attn.proj.bias)
    noisy, conditions = make_noisy(2), make_conditions([1, 2])
    mask = conditions.reference_mask[..., None, None].expand(-1, -1, -1, 8, 8)
    with torch.no_grad():
        velocity = silent(noisy, SIGMA[:2], conditions)
        expected = plain(
            torch.cat([noisy, mask, conditions.reference], dim=1),
            1000 * SIGMA[:2],
            nn.functional.pad(conditions.text, (0, 0, 0, 505)),
            conditions.image,
        ).sample
    assert relative(velocity, expected) < 1e-5
    assert relative(wan(noisy, SIGMA[:2], conditions), expected) > 1e-2


def test_a_batch_of_one_and_two_speakers_equals_each_alone(wan: Wan) -> None:
    counts = [1, 2, 1]
    noisy, together = make_noisy(3), make_conditions(counts)
    batched = wan(noisy, SIGMA, together)
    for i, count in enumerate(counts):
        alone = Conditions(
            text=together.text[i, None],
            image=together.image[i, None],
            reference=together.reference[i, None],
            reference_mask=together.reference_mask[i, None],
            audio=together.audio[i, None, :count],
            num_speakers=together.num_speakers[i, None],
            speaker_masks=together.speaker_masks[i, None, :count],
        )
        torch.testing.assert_close(
            wan(noisy[i, None], SIGMA[i, None], alone)[0], batched[i], rtol=1e-5, atol=1e-5
        )


def test_empty_speaker_slots_are_neither_heard_nor_seen(wan: Wan) -> None:
    noisy, conditions = make_noisy(2), make_conditions([2, 3])
    loud, everywhere = conditions.audio.clone(), conditions.speaker_masks.clone()
    loud[0, 2], everywhere[0, 2] = 100, 1
    other = replace(conditions, audio=loud, speaker_masks=everywhere)
    changed = wan(noisy, SIGMA[:2], other)
    assert torch.equal(changed, wan(noisy, SIGMA[:2], conditions))


def test_speakers_are_told_apart_by_their_masks(wan: Wan) -> None:
    noisy, conditions = make_noisy(1), make_conditions([2])
    exchanged = replace(conditions, speaker_masks=conditions.speaker_masks.flip(1))
    original = wan(noisy, SIGMA[:1], conditions)
    assert relative(wan(noisy, SIGMA[:1], exchanged), original) > 1e-3


def test_bands_of_positions() -> None:
    slots = torch.arange(3)
    starts = band_starts(torch.tensor([2, 3]), slots)
    assert starts[0, :2].tolist() == [0, 20]
    assert starts[1].tolist() == [0, 4, 8]


def test_three_speakers(wan: Wan) -> None:
    velocity = wan(make_noisy(1), SIGMA[:1], make_conditions([3]))
    assert velocity.isfinite().all()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.tensor([1.0, 0.0])[:, None, None].expand(2, 8, 8), "speaker 2 is empty"),
        (torch.ones(7, 8, 8), "at most 6"),
    ],
)
def test_unfit_speaker_masks_are_refused(masks: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=f"^clip3: .*{message}"):
        check_speaker_masks(masks, "clip3")


def test_fit_speaker_masks_pass() -> None:
    check_speaker_masks(make_conditions([2]).speaker_masks[0], "clip3")
    check_speaker_masks(torch.zeros(1, 8, 8), "clip3")


def test_an_image_is_one_frame(wan: Wan) -> None:
    velocity = wan(make_noisy(2, 1), SIGMA[:2], make_conditions([1, 2], 1))
    assert velocity.shape == (2, 16, 1, 8, 8)
    assert velocity.isfinite().all()


def test_text_is_padded_with_zeros(wan: Wan) -> None:
    noisy, conditions = make_noisy(1), make_conditions([1])
    padded = replace(conditions, text=nn.functional.pad(conditions.text, (0, 0, 0, 9)))
    velocity = wan(noisy, SIGMA[:1], conditions)
    torch.testing.assert_close(wan(noisy, SIGMA[:1], padded), velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("frame", "entry", "latent_frames"),
    [(0, 4, [0]), (1, 0, [1]), (1, 3, []), (2, 2, [1]), (2, 1, []), (4, 4, [1]), (5, 2, [2])],
)
def test_latent_frames_hear_eight_speech_frames(
    frame: int, entry: int, latent_frames: list[int]
) -> None:
    projector = AudioProjector(AudioSizes(3, 8, 16, 8, 2))
    draw_weights(projector, 1, torch.float32)
    audio = draw_normal((1, 1, 9, 5, 3, 8), 1)
    changed = audio.clone()
    changed[:, :, frame, entry] += 1
    difference = (projector(changed) - projector(audio)).abs().amax(dim=(0, 1, 3, 4))
    assert difference.nonzero().flatten().tolist() == latent_frames


@pytest.mark.parametrize(("num_speakers", "limit"), [([1, 1], 2e-2), ([2, 2], 8e-2)])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_near_float32(
    wan: Wan, num_speakers: list[int], limit: float, autocast: bool
) -> None:
    noisy, conditions = make_noisy(2), make_conditions(num_speakers)
    rounded = Wan(wan.transformer.config, audio=AudioSizes(3, 32, 16, 32, 4))
    rounded.load_state_dict(wan.state_dict())
    if not autocast:
        rounded.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        velocity = rounded(noisy, SIGMA[:2], conditions)
    assert velocity.dtype == torch.float32
    assert 0 < relative(velocity, wan(noisy, SIGMA[:2], conditions)) < limit


def gradients(model: Wan) -> tuple[list[Tensor], int]:
    """Give all gradients and count the numbers kept for the backward pass."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(make_noisy(2), SIGMA[:2], make_conditions([1, 2])).square().mean()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept


def test_recomputing_blocks_changes_memory_but_no_gradient() -> None:
    model = WanBase(path=str(TINY_BASE), random_weights=1, dtype="float32")
    wan = model.load_denoiser(torch.device("cpu")).requires_grad_(True)
    assert isinstance(wan, Wan)
    expected, kept = gradients(wan)
    assert len(expected) == len(list(wan.parameters()))
    for every, share in ((1, 0.5), (2, 0.8), (0, 1.01)):
        wan.checkpoint_activations(every)
        recomputed, fewer = gradients(wan)
        assert fewer < share * kept
        for gradient, other in zip(recomputed, expected, strict=True):
            torch.testing.assert_close(gradient, other)
    assert fewer == kept


def test_rotation_tables_made_for_a_preview_serve_training() -> None:
    grid_rotation.cache_clear()
    with torch.inference_mode():
        turn = grid_rotation((2, 2, 2), 24, torch.device("cpu"))
    x = torch.ones(1, 8, 1, 24, requires_grad=True)
    rotate(x, turn).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None


def test_nothing_is_lost_when_built_without_memory() -> None:
    model = WanBase(path=str(TINY_BASE), random_weights=1).empty_denoiser()
    assert not list(model.buffers())
    assert all(parameter.is_meta for parameter in model.parameters())
