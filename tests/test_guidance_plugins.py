"""Guidance as plugins: projected, CFG-Zero*, skip layers, normalised attention."""

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import (
    AdaptiveProjectedGuidance,
    MomentumBuffer,
)
from diffusers.guiders.classifier_free_zero_star_guidance import ClassifierFreeZeroStarGuidance
from diffusers.guiders.skip_layer_guidance import SkipLayerGuidance
from torch import Tensor

from kit import plugins
from kit.draws import draw_normal
from kit.guidance import combine
from kit.models.attention import KeysValues, attend
from kit.models.base import Encoders
from kit.models.inside import Entry, Layer, Update
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from kit.registry import options
from kit.sampling.chunks import plan_chunks
from kit.sampling.hooks import Hooks, InChunk
from kit.sampling.pipeline import TalkSampler
from kit.sampling.plugin import At, Plugin, Setup
from tests.test_sampler import make_sampler, make_scene, sample

PLUGINS: list[Any] = [plugins.load(name) for name in ("apg", "cfg_zero", "skip_layers", "nag")]
apg, cfg_zero, skip_layers, nag = PLUGINS
LEVELS = torch.tensor([1.0, 0.8, 0.5, 0.0])
SHAPE = (1, 4, 3, 4, 4)
Film = Callable[..., Tensor]


@pytest.fixture(scope="module")
def film(tiny_denoiser: Callable[[], Wan], tiny_encoders: Encoders) -> Film:
    """Makes a video of twelve frames in two chunks."""
    denoiser = tiny_denoiser()

    def make(*used: Plugin, **changed: Any) -> Tensor:
        hooks = Hooks({str(number): plugin for number, plugin in enumerate(used)})
        sampler = make_sampler(hooks=hooks, **changed)
        return torch.cat(sample(sampler, denoiser, tiny_encoders, make_scene(12)))

    return make


class Noting(Plugin):
    """Keeps the velocities of the first step."""

    def __init__(self) -> None:
        self._first: dict[str, Tensor] = {}

    def velocity(self, velocity: Tensor, velocities: Mapping[str, Tensor], at: At) -> Tensor:
        self._first = self._first or dict(velocities)
        return velocity


class Bypass(Plugin):
    """Leaves a block out in all rows."""

    def __init__(self, number: int) -> None:
        self._number = number

    def block(self, update: Update, number: int, x: Tensor, entry: Entry, at: At) -> Tensor:
        return x if number == self._number else update(x)


def drawn(step: int, *names: str) -> dict[str, Tensor]:
    return {name: draw_normal(SHAPE, step, name) for name in names}


def chunk_of(plugin: Plugin) -> InChunk:
    return Hooks({"it": plugin}).chunk(plan_chunks(9, 9, 5)[0], LEVELS)


def predicted(hooks: InChunk, step: int, velocities: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ask a denoiser that says these velocities, at a step."""
    hooks.begin(step)
    ask = hooks.ask(lambda *_: torch.cat(list(velocities.values())), tuple(velocities))
    conditions: Any = None
    rows = ask(noisy_at(step).expand(len(velocities), *SHAPE[1:]), LEVELS[step], conditions)
    return dict(zip(velocities, rows.split(1), strict=True))  # type: ignore[no-untyped-call]


def noisy_at(step: int) -> Tensor:
    return draw_normal(SHAPE, step, "noisy")


def not_used(*_: Any) -> Tensor:
    raise AssertionError("the sampler's own guidance was asked")


# Projected guidance


@pytest.mark.parametrize("scales", [(5.0, 4.0), (1.0, 4.0), (5.0, 1.0)])
def test_apg_is_the_samplers_projection_with_its_numbers(
    film: Film, scales: tuple[float, float]
) -> None:
    given = {"text_scale": scales[0], "audio_scale": scales[1], "steps": 3}
    assert torch.equal(film(apg(), **given), film(guidance="projected", **given))


@pytest.mark.parametrize("on", ["velocity", "clean"])
@pytest.mark.parametrize(("momentum", "threshold", "eta"), [(-0.75, 3.0, 0.0), (0.5, 900.0, 0.3)])
def test_apg_is_that_of_diffusers(on: str, momentum: float, threshold: float, eta: float) -> None:
    hooks = chunk_of(apg(momentum=momentum, threshold=threshold, eta=eta, on=on))
    guider = AdaptiveProjectedGuidance(
        guidance_scale=4.0,  # beyond the full prediction, so one less than ours
        adaptive_projected_guidance_rescale=threshold,
        eta=eta,
        use_original_formulation=True,
    )
    guider.momentum_buffer = MomentumBuffer(momentum)
    for step in range(3):
        velocities = predicted(hooks, step, drawn(step, "full", "no_text"))
        ours = hooks.combine(velocities, 5.0, 1.0, not_used)
        if on == "velocity":
            theirs = guider.forward(velocities["full"], velocities["no_text"]).pred
        else:
            sigma = LEVELS[step]
            clean = (noisy_at(step) - sigma * velocity for velocity in velocities.values())
            theirs = (noisy_at(step) - guider.forward(*clean).pred) / sigma
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on", ["velocity", "clean"])
def test_apg_that_keeps_everything_is_plain_guidance(on: str) -> None:
    hooks = chunk_of(apg(momentum=0.0, threshold=1e6, eta=1.0, on=on))
    velocities = predicted(hooks, 1, drawn(1, "full", "no_text", "none"))
    ours = hooks.combine(velocities, 5.0, 4.0, not_used)
    torch.testing.assert_close(ours, combine(velocities, 5.0, 4.0), rtol=1e-4, atol=1e-4)


def test_apg_remembers_within_a_chunk() -> None:
    plugin = apg()

    def combined(hooks: InChunk) -> Tensor:
        velocities = predicted(hooks, 0, drawn(0, "full", "no_text"))
        return hooks.combine(velocities, 5.0, 1.0, not_used)

    hooks = chunk_of(plugin)
    first, second, anew = combined(hooks), combined(hooks), combined(chunk_of(plugin))
    assert not torch.allclose(first, second)
    assert torch.equal(first, anew)


def test_apg_on_clean_latents_differs(film: Film) -> None:
    on_clean = film(apg(on="clean"))
    assert on_clean.isfinite().all()
    assert not torch.allclose(on_clean, film(apg()), atol=1e-3)


# CFG-Zero*


@pytest.mark.parametrize(
    ("names", "scales"),
    [
        (("full", "no_text"), (5.0, 1.0)),
        (("full", "no_audio"), (1.0, 5.0)),
        (("full", "no_text", "none"), (5.0, 5.0)),
    ],
)
def test_cfg_zero_is_that_of_diffusers(names: tuple[str, ...], scales: tuple[float, float]) -> None:
    hooks = chunk_of(cfg_zero(zero_steps=1))
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=1)
    for step in range(3):
        given = drawn(step, *names)
        guider.set_state(step, num_inference_steps=3, timestep=LEVELS[step])
        ours = hooks.combine(predicted(hooks, step, given), *scales, not_used)
        theirs = guider.forward(given["full"], given[names[-1]]).pred
        torch.testing.assert_close(ours, theirs)
        assert ours.any() == (step > 0)


def test_cfg_zero_ignores_the_length_of_negatives() -> None:
    hooks, given = chunk_of(cfg_zero()), drawn(1, "full", "no_text", "none")
    longer = {**given, "no_text": 7 * given["no_text"], "none": given["none"] / 9}
    first, second = (hooks.combine(each, 5.0, 4.0, not_used) for each in (given, longer))
    torch.testing.assert_close(first, second)
    parallel = {**given, "no_text": 0.3 * given["full"], "none": -2 * given["full"]}
    torch.testing.assert_close(hooks.combine(parallel, 5.0, 4.0, not_used), given["full"])


def test_cfg_zero_asks_nothing_where_it_stays() -> None:
    hooks = chunk_of(cfg_zero(zero_steps=2))
    asked = [0, 0, 0]
    for step in range(3):
        hooks.begin(step)

        def denoiser(*_: Any, step: int = step) -> Tensor:
            asked[step] += 1
            return draw_normal(SHAPE, "velocity")

        conditions: Any = None
        hooks.ask(denoiser, ("full",))(noisy_at(step), LEVELS[step], conditions)
    assert asked == [0, 0, 1]


# Skip layer guidance


def test_skip_layers_is_that_of_diffusers() -> None:
    plugin, guider = skip_layers(layers=[1]), SkipLayerGuidance(5.0, skip_layer_guidance_layers=1)
    hooks = Hooks({"it": plugin}).chunk(plan_chunks(9, 9, 5)[0], torch.linspace(1, 0, 41))
    conditions: Any = {"full": object(), "no_text": object()}
    active = []
    for step in range(40):
        hooks.begin(step)
        guider.set_state(step, num_inference_steps=40, timestep=LEVELS[0])
        wanted = hooks.branches(dict(conditions))
        given = drawn(step, *wanted)
        skipped = given.get("skipped", given["full"])
        ours = hooks.combine(given, 5.0, 1.0, combine)
        torch.testing.assert_close(
            ours, guider.forward(given["full"], given["no_text"], skipped).pred
        )
        active += [step] if "skipped" in wanted else []
    assert active == list(range(1, 8))


@pytest.mark.parametrize("together", [True, False])
def test_what_is_skipped_is_left_out_of_that_branch_alone(film: Film, together: bool) -> None:
    noting, plain, bypassed = Noting(), Noting(), Noting()
    film(skip_layers(layers=[1], start=0.0), noting, steps=1, together=together)
    film(plain, steps=1, together=together)
    film(Bypass(1), bypassed, steps=1, together=together)
    assert [*noting._first] == ["full", "no_text", "none", "skipped"]
    for name, velocity in plain._first.items():
        torch.testing.assert_close(noting._first[name], velocity, rtol=0, atol=1e-5)
    skipped = noting._first["skipped"]
    torch.testing.assert_close(skipped, bypassed._first["full"], rtol=0, atol=1e-5)
    assert not torch.allclose(skipped, plain._first["full"], atol=1e-2)


def test_skip_layers_works_without_other_guidance(film: Film) -> None:
    scales = {"text_scale": 1.0, "audio_scale": 1.0}
    skipping = partial(skip_layers, layers=[0], start=0.0, end=1.0)
    guided = film(skipping(), **scales)
    assert not torch.allclose(guided, film(**scales), atol=1e-3)
    one_by_one = film(skipping(), together=False, **scales)
    torch.testing.assert_close(one_by_one, guided, rtol=0, atol=1e-3)


# Normalised attention guidance

QUERY = draw_normal((3, 5, 2, 4), "query")
CAPTION, NEGATIVE = (
    KeysValues(draw_normal((rows, 6, 2, 4), rows, "key"), draw_normal((rows, 6, 2, 4), rows, "v"))
    for rows in (3, 1)
)
TEXT, IMAGE = Layer("text", 0, 2, lambda states: NEGATIVE), Layer("image", 0, 2)


def attention(plugin: Plugin, *branches: str, layer: Layer = TEXT) -> Tensor:
    run: Any = SimpleNamespace(encoded=SimpleNamespace(null_text=torch.zeros(1, 1, 4)))
    plugin.open(run)
    at = At(plan_chunks(9, 9, 5)[0], 0, 3, 1.0, 0.8, branches)
    return plugin.attention(attend, layer, QUERY, CAPTION, at)


def test_nag_by_its_formula() -> None:
    caption = attend(QUERY, CAPTION)
    negative = attend(QUERY, KeysValues(*(x.expand(3, -1, -1, -1) for x in NEGATIVE[:2])))
    names = ("full", "no_audio", "skipped")
    free = attention(nag(scale=3, tau=1e6, alpha=0.25), *names)
    torch.testing.assert_close(free, caption + 0.25 * 2 * (caption - negative))
    limited = attention(nag(scale=500, tau=1.5, alpha=1), *names)
    torch.testing.assert_close(limited.abs().sum(-1), 1.5 * caption.abs().sum(-1))
    toward = 500 * caption - 499 * negative
    torch.testing.assert_close(
        limited, limited.norm(dim=-1, keepdim=True) * toward / toward.norm(dim=-1, keepdim=True)
    )


def test_nag_guides_the_caption_in_attention_to_text_alone() -> None:
    plain = attend(QUERY, CAPTION)
    guided = attention(nag(), "full", "no_text", "none")
    assert torch.equal(guided[1:], plain[1:])
    assert not torch.allclose(guided[0], plain[0], atol=1e-3)
    assert torch.equal(attention(nag(), "full", "no_audio", "skipped", layer=IMAGE), plain)


def test_nag_takes_the_samplers_negative_text_or_its_own(film: Film) -> None:
    scales = {"text_scale": 1.0, "audio_scale": 1.0}
    own = film(nag(negative="blurry hands"), **scales)
    assert torch.equal(film(nag(), negative_text="blurry hands", **scales), own)
    assert not torch.allclose(own, film(**scales), atol=1e-3)
    same_as_caption = film(nag(negative="a person speaks"), **scales)
    torch.testing.assert_close(same_as_caption, film(**scales), rtol=0, atol=1e-3)


def test_nag_one_by_one_or_without_memory_is_the_same(film: Film) -> None:
    together = film(nag())
    for changed in ({"together": False}, {"remember": False}):
        torch.testing.assert_close(film(nag(), **changed), together, rtol=0, atol=1e-3)


def test_nag_embeds_its_negative_once_a_chunk(
    tiny_denoiser: Callable[[], Wan], tiny_encoders: Encoders
) -> None:
    denoiser, calls = tiny_denoiser(), list[int]()
    embedder = denoiser.transformer.condition_embedder.text_embedder
    embedder.register_forward_hook(lambda *_: calls.append(1))
    sampler = make_sampler(hooks=Hooks({"nag": nag(negative="hands")}), steps=3)
    sample(sampler, denoiser, tiny_encoders, make_scene(12))
    assert len(calls) == 2 * 2  # chunks; all branches at once, and the negative


def test_nag_frees_the_text_encoder(tiny_encoders: Encoders) -> None:
    journal: list[str] = []

    class Noted:
        def encode_text(self, texts: list[str]) -> list[Tensor]:
            journal.append(f"encode {texts[0]}")
            return tiny_encoders.encode_text(texts)

        def release(self, *parts: str) -> None:
            journal.extend(parts)

    run: Any = SimpleNamespace(encoded=SimpleNamespace(null_text=None), encoders=Noted())
    nag(negative="hands").open(run)
    assert journal == ["encode hands", "text"]


# All of them


@pytest.mark.parametrize(
    ("plugin", "changed"),
    [
        (apg(), {"text_scale": 1.0, "audio_scale": 1.0}),
        (cfg_zero(zero_steps=0), {"text_scale": 1.0, "audio_scale": 1.0}),
        (skip_layers(layers=[0], start=0.0, scale=0), {}),
        (skip_layers(layers=[0], start=0.6, end=0.9), {}),
        (nag(scale=1), {}),
        (nag(alpha=0), {}),
        (nag(start=0.6, end=0.9), {}),
    ],
)
def test_what_is_off_changes_no_bit(film: Film, plugin: Plugin, changed: Any) -> None:
    assert torch.equal(film(plugin, **changed), film(**changed))


def setup(base: WanBase, **sampling: Any) -> Setup:
    defaults = {name: one.default for name, one in options(TalkSampler).items()}
    return Setup(base.empty_denoiser(), base.geometry, {**defaults, **sampling}, (32, 32), True, ())


@pytest.mark.parametrize(
    ("plugin", "sampling", "message"),
    [
        (apg(), {"guidance": "projected"}, "takes the place of sampling.guidance: projected"),
        (cfg_zero(), {"guidance": "projected"}, "takes the place of sampling.guidance: projected"),
        (cfg_zero(zero_steps=4), {"steps": 4}, "zero_steps: 4 of 4 steps leave none to move"),
        (skip_layers(layers=[1, 2]), {}, "layers: 2 is no block of this base; valid: 0 to 1"),
        (skip_layers(layers=[0], start=0.5), {}, "start: 0.5 is not below end: 0.2"),
        (nag(unit="sigma"), {}, "start: 0.0 is not above end: 1.0, in the unit 'sigma'"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_base: WanBase, plugin: Plugin, sampling: dict[str, Any], message: str
) -> None:
    (problem,) = Hooks({"it": plugin}).problems(setup(tiny_base, **sampling))
    assert problem.startswith(f"plugins.it: {message}")


def test_what_can_be_is_not_refused(tiny_base: WanBase) -> None:
    used = {"apg": apg(), "skip": skip_layers(layers=[1]), "nag": nag()}
    assert Hooks(used).problems(setup(tiny_base)) == []
    both = Hooks({"apg": apg(), "cfg_zero": cfg_zero()}).problems(setup(tiny_base))
    assert both == ["plugins: apg and cfg_zero cannot go together: each is the one with 'combine'"]
