"""What is not computed, computed once or computed otherwise changes no result."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kit.adapters.lora import Lora, trained_parameters
from kit.batch import Conditions
from kit.draws import draw_normal
from kit.guidance import pad_text
from kit.models.attention import padding_bias, rotate, rotation
from kit.models.base import Encoders
from kit.models.cpu import (
    QUERIES_AT_ONCE,
    OneDnnProducts,
    fast_products,
    mixed_by_head,
    product,
)
from kit.models.tokens import by_pieces
from kit.models.wan import Wan
from kit.reference import Unchanged, first_frame_mask, followed_by_grey
from kit.sampling.frames import StillSource, to_pictures
from kit.sampling.pipeline import TalkSampler, no_progress
from kit.sampling.scene import Scene, Source

CPU = torch.device("cpu")
MakeWan = Callable[[], Wan]
NOISY, SIGMA = draw_normal((1, 16, 3, 8, 8), "noisy"), torch.tensor(0.7)
NULL_TEXT = draw_normal((1, 9, 32), "null_text")


@pytest.fixture(scope="module")
def wan(tiny_denoiser: MakeWan) -> Wan:
    return tiny_denoiser()


def make_conditions(speakers: int) -> Conditions:
    masks = torch.zeros(1, speakers, 8, 8)
    for speaker in range(speakers):
        masks[0, speaker, 2:, 2 * speaker : 2 * speaker + 2] = 1
    return Conditions(
        text=draw_normal((1, 7, 32), "text"),
        image=draw_normal((1, 17, 32), "image"),
        reference=draw_normal((1, 16, 3, 8, 8), "reference"),
        reference_mask=first_frame_mask(1, 3),
        audio=draw_normal((1, speakers, 9, 5, 3, 32), "audio"),
        num_speakers=torch.tensor([speakers]),
        speaker_masks=masks,
    )


@torch.no_grad()
def guided(wan: Wan, conditions: Conditions, steps: int = 1, **options: Any) -> list[Tensor]:
    """Predict the velocity of some steps under guidance, each at another level."""
    velocity = TalkSampler(**options).guided(wan, conditions, NULL_TEXT)
    return [velocity(NOISY + step, SIGMA / (step + 1)) for step in range(steps)]


def count_calls(modules: dict[str, nn.Module]) -> Counter[str]:
    """Count how often modules are called from now on."""
    calls: Counter[str] = Counter()
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("speakers", [1, 2])
@pytest.mark.parametrize("together", [True, False])
def test_what_is_remembered_is_what_would_be_computed(
    wan: Wan, speakers: int, together: bool
) -> None:
    conditions = make_conditions(speakers)
    plain = guided(wan, conditions, steps=3, together=together, remember=False)
    remembered = guided(wan, conditions, steps=3, together=together)
    assert all(map(torch.equal, remembered, plain))
    assert not torch.equal(plain[1], plain[0])


def test_conditions_are_embedded_once_for_all_steps_and_branches(tiny_denoiser: MakeWan) -> None:
    wan = tiny_denoiser()
    block, embedder = wan.transformer.blocks[1], wan.transformer.condition_embedder
    calls = count_calls(
        {
            "text": embedder.text_embedder,
            "image": embedder.image_embedder,
            "audio": wan.audio_proj,
            "keys of text": block.attn2.to_k,
            "keys of image": block.attn2.add_k_proj,
            "keys of audio": block.audio_cross_attn.kv_linear,
            "queries": block.attn1.to_q,
        }
    )
    guided(wan, make_conditions(2), steps=2, together=False)
    # Two texts, one image, speech and silence; three branches in two steps.
    assert calls == {
        "text": 2,
        "image": 1,
        "audio": 2,
        "keys of text": 2,
        "keys of image": 1,
        "keys of audio": 2,
        "queries": 6,
    }
    calls.clear()
    guided(wan, make_conditions(2), steps=2, together=False, remember=False)
    assert set(calls.values()) == {6}


def test_a_chunk_does_not_remember_another(wan: Wan) -> None:
    sampler, conditions = TalkSampler(steps=1), make_conditions(1)
    louder = replace(conditions, audio=2 * conditions.audio)
    (expected,) = guided(wan, louder, remember=False)
    with torch.no_grad():
        sampler.guided(wan, conditions, NULL_TEXT)(NOISY, SIGMA)
        velocity = sampler.guided(wan, louder, NULL_TEXT)(NOISY, SIGMA)
    assert torch.equal(velocity, expected)


def test_adapters_count_in_what_is_remembered(tiny_denoiser: MakeWan) -> None:
    adapted, conditions = tiny_denoiser(), make_conditions(2)
    before = guided(adapted, conditions)[0]
    Lora(rank=4, parts=["attention", "audio"]).inject(adapted, seed=0)
    with torch.no_grad():
        for name, parameter in trained_parameters(adapted).items():
            is_of_conditions = any(n in name for n in ("attn2.to_k", "attn2.add_v", "kv_linear"))
            parameter.mul_(1 if is_of_conditions else 0)
            parameter.add_(0.05 * draw_normal(tuple(parameter.shape), name) * is_of_conditions)
    after = guided(adapted, conditions, steps=2)
    assert not torch.allclose(after[0], before, atol=1e-2)
    assert all(map(torch.equal, after, guided(adapted, conditions, steps=2, remember=False)))


def test_training_computes_all_afresh(tiny_denoiser: MakeWan) -> None:
    wan, conditions = tiny_denoiser().requires_grad_(True), make_conditions(1)
    key = wan.transformer.blocks[0].attn2.to_k.weight
    for _ in range(2):
        wan.zero_grad()
        wan(NOISY, SIGMA[None], conditions).square().mean().backward()
        assert key.grad is not None and key.grad.any()
    with torch.no_grad():
        before = wan(NOISY, SIGMA[None], conditions)
        key.mul_(2)
        assert not torch.allclose(wan(NOISY, SIGMA[None], conditions), before, atol=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_two_keys_stand_for_all_padding(
    tiny_denoiser: MakeWan, dtype: torch.dtype, limit: float
) -> None:
    wan, conditions = tiny_denoiser(), make_conditions(1)
    conditions = replace(conditions, text=3 * conditions.text)
    full = replace(conditions, text=pad_text(conditions.text, wan.text_length))
    with torch.no_grad():
        expected = wan(NOISY, SIGMA[None], full)
        velocity = wan.to(dtype)(NOISY, SIGMA[None], conditions)
    assert (velocity - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize("count", [3, 10, 200, 511])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-3)])
def test_the_padding_weighs_what_its_tokens_did(
    count: int, dtype: torch.dtype, limit: float
) -> None:
    bias = padding_bias(5, count, torch.device("cpu")).to(dtype).double().flatten()
    assert bias[:3].tolist() == [0, 0, 0]
    assert bias[3:].exp().sum().item() == pytest.approx(count, rel=limit)


def test_text_of_full_length_and_beyond(wan: Wan) -> None:
    text = draw_normal((1, 520, 32), "long")
    lengths = (509, 510, 511, 512, 520)
    with torch.no_grad():
        velocities = {
            length: wan(NOISY, SIGMA[None], replace(make_conditions(1), text=text[:, :length]))
            for length in lengths
        }
    assert torch.equal(velocities[512], velocities[520])
    assert not torch.equal(velocities[510], velocities[512])


def test_silence_among_several_speakers_needs_no_places(wan: Wan) -> None:
    one = make_conditions(1)
    among_two = replace(
        one,
        audio=F.pad(one.audio, (0, 0) * 4 + (0, 1)),
        speaker_masks=F.pad(one.speaker_masks, (0, 0, 0, 0, 0, 1)),
    )
    with torch.no_grad():
        velocity = wan(NOISY, SIGMA[None], among_two)
        assert torch.equal(velocity, wan(NOISY, SIGMA[None], one))


@pytest.mark.parametrize("speakers", [1, 2])
def test_branches_together_are_branches_one_by_one(wan: Wan, speakers: int) -> None:
    conditions = make_conditions(speakers)
    (together,), (apart,) = (guided(wan, conditions, together=t) for t in (True, False))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.no_grad()
def test_attention_by_head(dtype: torch.dtype, limit: float, has_bias: bool) -> None:
    num_queries = 2 * QUERIES_AT_ONCE * torch.get_num_threads() + 3
    query = draw_normal((2, 3, num_queries, 8), "query")
    key, value = (draw_normal((2, 3, 40, 8), name) for name in ("key", "value"))
    bias = draw_normal((2, 1, 1, 40), "bias") if has_bias else None
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    rounded = None if bias is None else bias.to(dtype)
    mixed = mixed_by_head(query.to(dtype), key.to(dtype), value.to(dtype), rounded)
    assert (mixed - expected).norm() / expected.norm() < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gradients_of_attention_by_head(dtype: torch.dtype, limit: float, has_bias: bool) -> None:
    num_queries = QUERIES_AT_ONCE * torch.get_num_threads() + 44
    sizes = {"query": num_queries, "key": 300, "value": 300}
    given = [draw_normal((2, n, 3, 8), name).requires_grad_() for name, n in sizes.items()]
    bias = draw_normal((2, 1, 1, 300), "bias") if has_bias else None
    target = draw_normal((2, num_queries, 24), "target")

    def gradients(mixture: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        query, key, value = (x.to(dtype).transpose(1, 2) for x in given)
        rounded = None if bias is None else bias.to(dtype)
        mixed = mixture(query, key, value, attn_mask=rounded).transpose(1, 2).flatten(2)
        return torch.autograd.grad((mixed * target).sum(), given)

    expected = gradients(F.scaled_dot_product_attention, torch.float32)
    found = gradients(mixed_by_head, dtype)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() / other.norm() < limit


@torch.no_grad()
def test_linear_layers_by_one_dnn() -> None:
    layer, x = nn.Linear(24, 40), draw_normal((2, 5, 24), "x")
    with OneDnnProducts():
        for given in (x, x[:, 1:3], x.transpose(0, 1), x.bfloat16().float()):
            torch.testing.assert_close(layer(given), given @ layer.weight.T + layer.bias)
        without_bias = F.linear(x, layer.weight)
        rounded = F.linear(x.bfloat16(), layer.weight.bfloat16())
    torch.testing.assert_close(without_bias, x @ layer.weight.T)
    assert rounded.dtype == torch.bfloat16


@pytest.mark.parametrize("trained", [{"weight"}, {"x"}, {"x", "weight", "bias"}])
@pytest.mark.parametrize("rows", [5, 0])
def test_linear_layers_by_one_dnn_have_their_gradients(trained: set[str], rows: int) -> None:
    given = {"x": (2, rows, 24), "weight": (40, 24), "bias": (40,)}
    leaves = [draw_normal(s, n).requires_grad_(n in trained) for n, s in given.items()]
    target = draw_normal((2, rows, 40), "target")
    expected = torch.autograd.grad(
        (F.linear(*leaves) * target).sum(), [x for x in leaves if x.requires_grad]
    )
    with fast_products(CPU):
        result = F.linear(*leaves)
    found = torch.autograd.grad((result * target).sum(), [x for x in leaves if x.requires_grad])
    torch.testing.assert_close(found, expected)


def test_rows_with_gaps_are_multiplied() -> None:
    x, wide = draw_normal((5, 24), "x"), draw_normal((40, 3, 24), "wide")
    torch.testing.assert_close(product(x, wide[:, 1]), x @ wide[:, 1].T)
    torch.testing.assert_close(product(x, wide[:24, 1].T), x @ wide[:24, 1])


def test_autocast_is_left_to_torch() -> None:
    layer, x = nn.Linear(24, 40), draw_normal((5, 24), "x")
    with torch.autocast("cpu", torch.bfloat16), fast_products(CPU):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # of other devices
@pytest.mark.parametrize("every", [0, 1])
def test_training_has_the_gradients_of_torch(tiny_denoiser: MakeWan, every: int) -> None:
    """Large enough for attention by head: 300 tokens."""
    wan, conditions, video = tiny_denoiser(), make_conditions(2), (1, 16, 3, 20, 20)
    reference, masks = draw_normal(video, "reference"), F.pad(conditions.speaker_masks, (0, 12) * 2)
    conditions = replace(conditions, reference=reference, speaker_masks=masks)
    Lora(rank=4, parts=["attention", "ffn", "audio"]).inject(wan, seed=0)
    trained = list(trained_parameters(wan).values())

    def gradients() -> tuple[Tensor, ...]:
        velocity = wan(draw_normal(video, "noisy"), SIGMA[None], conditions)
        return torch.autograd.grad(velocity.square().mean(), trained)

    with torch.backends.mkldnn.flags(enabled=False):
        expected = gradients()
    wan.checkpoint_activations(every)
    torch.testing.assert_close(gradients(), expected, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_tokens_in_pieces(wan: Wan) -> None:
    layers, x = wan.transformer.blocks[0].ffn, draw_normal((2, 10, 48), "x")
    torch.testing.assert_close(by_pieces(layers, x), layers(x))
    assert by_pieces(layers, x[:, :1]).shape == (2, 1, 48)


def test_rotation_turns_pairs_by_their_angles() -> None:
    positions, x = torch.tensor([0.0, 1.5, 22.0]), draw_normal((3, 2, 8), "x")
    angles = positions.double()[:, None, None] * 10_000 ** (-torch.arange(0, 8, 2) / 8)
    (even, odd), cos, sin = (x[..., ::2], x[..., 1::2]), angles.cos(), angles.sin()
    turned = rotate(x, rotation(positions, 8))
    torch.testing.assert_close(turned[..., ::2], (even * cos - odd * sin).float())
    torch.testing.assert_close(turned[..., 1::2], (even * sin + odd * cos).float())


class Encoding:
    """Encoders that count whole windows."""

    def __init__(self, encoders: Encoders) -> None:
        self.encoders = encoders
        self.windows = 0
        self.pictures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.encoders, name)

    def encode_video(self, pixels: Tensor) -> Tensor:
        self.windows += pixels.shape[2] == 9
        return self.encoders.encode_video(pixels)

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.pictures += 1
        return self.encoders.encode_image(pixels)


class Moving:
    """A source whose pictures all differ."""

    def frame(self, index: int) -> Tensor:
        return 0.1 * draw_normal((3, 32, 32), index)


PORTRAIT = StillSource(to_pictures(Moving().frame(0)[None])[0], (32, 32))


@pytest.mark.parametrize(("source", "encoded"), [(PORTRAIT, 1), (Moving(), 3)])
def test_a_portrait_is_encoded_once(
    wan: Wan, tiny_encoders: Encoders, source: Source, encoded: int
) -> None:
    encoders = Encoding(tiny_encoders)
    sampler = TalkSampler(steps=1, num_frames=9, context_frames=5, text_scale=1.0, audio_scale=1.0)
    tracks = 0.1 * draw_normal((1, 640 * 17), "speech")
    scene = Scene("a person speaks", tracks, source, torch.ones(1, 4, 4))
    made = list(sampler.sample(wan, encoders, scene, 0, no_progress))
    assert len(made) == 3
    assert (encoders.windows, encoders.pictures) == (encoded, encoded)


def test_pictures_that_differ_are_made_anew() -> None:
    double, made = Unchanged[Tensor](), []
    portrait, other = draw_normal((1, 3, 4, 4), 1), draw_normal((1, 3, 4, 4), 2)

    def make(pictures: Tensor) -> Tensor:
        made.append(pictures)
        return 2 * pictures

    given = [portrait, portrait.clone(), other, portrait, torch.cat([portrait, other])]
    assert all(torch.equal(double(make, pictures), 2 * pictures) for pictures in given)
    assert len(made) == 4


def test_grey_frames_show_the_picture_for_a_long_time(tiny_encoders: Encoders) -> None:
    """No shorter window will do: with half of Wan's layers, 20 latent frames look back at it."""
    frames = followed_by_grey(draw_normal((3, 16, 16), "picture").clamp(-1, 1), 81)
    latents = tiny_encoders.encode_video(frames[None])
    change = (latents[:, :, 1:] - latents[:, :, :-1]).abs().amax(dim=(0, 1, 3, 4))
    assert (change > 1e-4).all()
