"""Low-rank adapters on a frozen denoiser, by PEFT, and parts of it that train fully."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor, nn

from kit.adapters.importing import find
from kit.adapters.kinds import ALPHA, KINDS, Size, Sizes, by_layer, rank_of, shape_of
from kit.draws import seed_of
from kit.errors import InputError, did_you_mean
from kit.models.base import Denoiser
from kit.models.checkpoints import parameter_shapes
from kit.models.hollow import in_float32, is_hollow
from kit.models.lora_files import AdapterFile
from kit.models.tensor_files import shorten

ADAPTER_NAME = "default"

Part = Literal["attention", "ffn", "audio"]


class Lora:
    """Which parts of a denoiser train, and how.

    Args:
        kind: `lora`, `dora`, `loha` or `lokr`. The two latter cannot be trained on top of a base
            of 4 or 8 bits, and few programs read any but the first.
        rank: of the factors.
        alpha: their product is scaled by alpha / rank; equal to rank if absent.
        parts: parts whose linear layers get factors.
        ranks: of parts that differ.
        alphas: of parts that differ.
        rank_stabilised: scale by alpha / sqrt(rank) instead, so that large ranks learn as fast.
        train_fully: parts trained without factors, all their parameters.
        dropout: share of the factors' inputs dropped in training, 0 to 1; of `lora` and `dora`.
        factor: of `lokr`: how the sizes of weights are split in two; -1 splits them most evenly.
        start: adapter to go on from, of this kit or another program; its layers keep their ranks
            and alphas, others begin afresh.

    Source: Hu et al. 2021; ranks of 16 to 64 with alpha = rank are usual for characters on Wan;
    rank-stabilised: Kalajdzievski 2023. See `KINDS` for the others.
    """

    def __init__(
        self,
        *,
        kind: Literal["lora", "dora", "loha", "lokr"] = "lora",
        rank: Annotated[int, Field(ge=1)] = 32,
        alpha: Annotated[float, Field(gt=0)] | None = None,
        parts: Sequence[Part] = ("attention", "ffn", "audio"),
        ranks: Mapping[Part, Annotated[int, Field(ge=1)]] | None = None,
        alphas: Mapping[Part, Annotated[float, Field(gt=0)]] | None = None,
        rank_stabilised: bool = False,
        train_fully: Sequence[Part] = (),
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        factor: Annotated[int, Field(ge=-1)] = -1,
        start: AdapterFile | None = None,
    ) -> None:
        self.kind = kind
        self.rank = rank
        self.alpha = alpha
        self.parts = tuple(parts)
        self.ranks = dict(ranks or {})
        self.alphas = dict(alphas or {})
        self.rank_stabilised = rank_stabilised
        self.train_fully = tuple(train_fully)
        self.dropout = dropout
        self.factor = factor
        self.start = None if start is None else Path(start)

    def size(self, part: Part) -> Size:
        """Give the rank of a part's layers, and the alpha that scales them when divided by it."""
        rank = self.ranks.get(part, self.rank)
        alpha = self.alphas.get(part, rank if self.alpha is None else self.alpha)
        return Size(rank, float(alpha * (math.sqrt(rank) if self.rank_stabilised else 1)))

    def problems(self, denoiser: Denoiser) -> list[str]:
        """List what of this the denoiser has no place for, in words."""
        found = self._unknown(denoiser)
        both = set(self.parts) & set(self.train_fully)
        found += [f"adapter: '{part}' is in both parts and train_fully" for part in sorted(both)]
        idle = sorted({*self.ranks, *self.alphas} - set(self.parts))
        found += [f"adapter: '{part}' has a rank or alpha, but is not in parts" for part in idle]
        if not self.parts and not self.train_fully:
            found.append("adapter: parts and train_fully are both empty, so nothing would train")
        if self.dropout and not KINDS[self.kind].has_dropout:
            found.append(f"adapter.dropout: '{self.kind}' has none; take 0")
        if self.factor != -1 and self.kind != "lokr":
            found.append(f"adapter.factor: '{self.kind}' splits no sizes; leave it out")
        return found or self._start_problems(denoiser)

    def _start_problems(self, denoiser: Denoiser) -> list[str]:
        """Say what of the adapter to go on from would be lost."""
        if self.start is None:
            return []
        try:
            found = find(self.start, parameter_shapes(denoiser))
        except InputError as error:
            return [f"adapter.start: {error}"]
        if found.kind not in (None, self.kind):
            return [f"adapter.kind: '{self.start}' is a {found.kind}, not a {self.kind}"]
        lost = {
            "parts": found.factors.keys() - self._sizes(denoiser).keys(),
            "train_fully": found.whole.keys() - self._whole(denoiser),
        }
        return [
            f"adapter.{name}: '{self.start}' changes {shorten(sorted(names))}, which would be lost"
            for name, names in lost.items()
            if names
        ]

    def _unknown(self, denoiser: Denoiser) -> list[str]:
        lists = (("parts", self.parts), ("train_fully", self.train_fully))
        valid = {"parts": denoiser.parts(), "train_fully": denoiser.trainable_parts()}
        return [
            f"adapter.{name}: unknown part '{part}'{did_you_mean(part, valid[name])}"
            for name, parts in lists
            for part in parts
            if part not in valid[name]
        ]

    def inject(self, denoiser: Denoiser, seed: int) -> None:
        """Put fresh factors on the denoiser and let only the chosen parameters train, in float32.

        Factors start as the identity: the denoiser's output does not change.
        """
        denoiser.requires_grad_(False)
        sizes, tensors = self._sizes(denoiser), {}
        if self.start is not None:
            tensors = find(self.start, parameter_shapes(denoiser)).read()
            sizes |= _sizes_of(tensors, self.kind)
        whole = self._whole(denoiser)
        add_factors(denoiser, self.kind, sizes, self.dropout, self.factor, seed)
        for name in whole:
            parameter = denoiser.get_parameter(name)
            parameter.data = in_float32(parameter.data)
            parameter.requires_grad_(True)
        put_tensors(denoiser, tensors, self.kind)

    def start_values(self, denoiser: Denoiser) -> Mapping[str, Tensor]:
        """Read what takes the place of the base's parameters at the start of the training."""
        if self.start is None:
            return {}
        found = find(self.start, parameter_shapes(denoiser))
        return replace(found, factors={}).read()

    def _sizes(self, denoiser: Denoiser) -> dict[str, Size]:
        return {layer: self.size(part) for part in self.parts for layer in denoiser.parts()[part]}

    def _whole(self, denoiser: Denoiser) -> set[str]:
        """Name the parameters of parts that train without factors."""
        modules = [name for part in self.train_fully for name in denoiser.trainable_parts()[part]]
        return {
            f"{module}.{name}"
            for module in modules
            for name, _ in denoiser.get_submodule(module).named_parameters()
        }


def add_factors(
    denoiser: nn.Module,
    kind: str,
    sizes: Sizes,
    dropout: float = 0.0,
    factor: int = -1,
    seed: int = 0,
) -> None:
    """Put factors of a kind on linear layers by name; equal seeds give equal factors."""
    if not sizes:
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "adapter"))
        config = KINDS[kind].configure(sizes, dropout, factor)
        inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER_NAME)
    # PEFT gives factors the base's dtype; they train, and are added, in float32.
    for name in sizes:
        for own, parameter in denoiser.get_submodule(name).named_parameters():
            if f".{ADAPTER_NAME}" in own:
                parameter.data = parameter.data.float()


def trained_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters that train, as an adapter file names them."""
    return {
        adapter_key(name): parameter
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }


def adapter_key(name: str) -> str:
    """Drop what PEFT puts into a parameter's name."""
    plain = name.replace(".base_layer.", ".")
    plain = plain.replace(f".lora_magnitude_vector.{ADAPTER_NAME}.weight", ".lora_magnitude_vector")
    return plain.replace(f".{ADAPTER_NAME}.", ".").removesuffix(f".{ADAPTER_NAME}")


def adapter_tensors(
    denoiser: nn.Module, trained: Mapping[str, Tensor], kind: str
) -> dict[str, Tensor]:
    """Put together what an adapter file holds: what trained, and the alpha of each layer.

    Args:
        denoiser: with the adapter.
        trained: its parameters or averages of them, named as by `trained_parameters`.
        kind: of the adapter.
    """
    tensors = {name: tensor.detach() for name, tensor in trained.items()}
    for layer, names in by_layer(trained, kind).items():
        rank = rank_of({own: trained[name] for own, name in names.items()})
        module = denoiser.get_submodule(layer)
        scale = float(module.scaling[ADAPTER_NAME])  # type: ignore[index]
        if rank is None:
            # Nothing in the file tells a rank, so that readers scale nothing.
            key = next(names[own] for own in KINDS[kind].scaled if own in names)
            tensors[key] = tensors[key] * scale
        tensors[f"{layer}.{ALPHA}"] = torch.tensor(1.0 if rank is None else scale * rank)
    return tensors


def apply_adapter(denoiser: Denoiser, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Put a trained adapter on a denoiser without adapters.

    Args:
        denoiser: receives factors and replaced parameters.
        tensors: content of an adapter file.
        kind: of its factors.

    Raises:
        InputError: a tensor has no place in this denoiser, or another shape.
    """
    require_fit(denoiser, tensors, kind)
    add_factors(denoiser, kind, _sizes_of(tensors, kind))
    put_tensors(denoiser, tensors, kind)


@torch.no_grad()
def put_tensors(denoiser: nn.Module, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Give a denoiser that has factors already their numbers, and whole parameters theirs.

    Those without memory are given theirs when they are filled; see `Lora.start_values`.
    """
    layers = by_layer(tensors, kind)
    for layer, names in layers.items():
        own = {name: tensors[key] for name, key in names.items() if name != ALPHA}
        _set_factors(denoiser.get_submodule(layer), own)
    places = {adapter_key(name): p for name, p in denoiser.named_parameters()}
    in_layers = {key for names in layers.values() for key in names.values()}
    for name in tensors.keys() - in_layers:
        if not is_hollow(places[name]):
            places[name].copy_(tensors[name])


def _sizes_of(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Size]:
    """Find how large an adapter's factors are."""
    layers = by_layer(tensors, kind)
    return {layer: _size(names, tensors, kind) for layer, names in layers.items()}


def _size(names: Mapping[str, str], tensors: Mapping[str, Tensor], kind: str) -> Size:
    rank = rank_of({own: tensors[key] for own, key in names.items()})
    if rank is None:
        return Size(1, 1.0)
    return Size(rank, float(tensors[names[ALPHA]]) if ALPHA in names else float(rank))


def _set_factors(layer: nn.Module, factors: Mapping[str, Tensor]) -> None:
    """Give a layer these factors in place of those that it has, however they are split."""
    assert isinstance(layer, BaseTunerLayer)
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    for name in layer.adapter_layer_names:
        held = getattr(layer, name)
        if isinstance(held, nn.ParameterDict):
            if ADAPTER_NAME in held:
                del held[ADAPTER_NAME]
            if name in factors:
                held[ADAPTER_NAME] = nn.Parameter(factors[name].to(weight.device, torch.float32))
        elif ADAPTER_NAME in held:
            key = name if name in factors else f"{name}.weight"
            held[ADAPTER_NAME].weight.data.copy_(factors[key])


def require_fit(denoiser: Denoiser, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Refuse an adapter that was trained on a denoiser of another shape.

    Raises:
        InputError: lists the tensors that do not fit.
    """
    shapes = parameter_shapes(denoiser)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    layers = by_layer(tensors, kind)
    in_layers = {key for names in layers.values() for key in names.values()}
    wrong = [
        f"{name}: {found[name]}, not {shapes.get(name)}"
        for name in tensors
        if name not in in_layers and found[name] != shapes.get(name)
    ]
    for layer, names in layers.items():
        made = shape_of({own: tensors[key] for own, key in names.items()})
        wanted = shapes.get(f"{layer}.weight")
        if made is None or made != wanted:
            wrong.append(f"{layer}: factors of {made}, not {wanted}")
    if wrong:
        listed = "\n  ".join(wrong[:5])
        raise InputError(
            f"adapter: {len(wrong)} of its {len(tensors)} tensors do not fit this base; "
            f"was it trained on another?\n  {listed}"
        )
