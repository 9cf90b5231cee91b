"""Low-rank adapters on a frozen denoiser, by PEFT, and parts of it that train fully."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from pydantic import Field
from torch import Tensor, nn

from kit.draws import seed_of
from kit.errors import InputError, did_you_mean
from kit.models.base import Denoiser

ADAPTER_NAME = "default"

Part = Literal["attention", "ffn", "audio"]


class Lora:
    """Which parts of a denoiser train, and how.

    Args:
        rank: of the two factors.
        alpha: the product is scaled by alpha / rank; equal to rank if absent.
        parts: parts whose linear layers get factors.
        train_fully: parts trained without factors, all their parameters.
        dropout: share of the factors' inputs dropped in training, 0 to 1.

    Source: Hu et al. 2021; ranks of 16 to 64 with alpha = rank are usual for characters on Wan.
    """

    def __init__(
        self,
        *,
        rank: Annotated[int, Field(ge=1)] = 32,
        alpha: Annotated[float, Field(gt=0)] | None = None,
        parts: Sequence[Part] = ("attention", "ffn", "audio"),
        train_fully: Sequence[Part] = (),
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ) -> None:
        self.rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.parts = tuple(parts)
        self.train_fully = tuple(train_fully)
        self.dropout = dropout

    def problems(self, denoiser: Denoiser) -> list[str]:
        """List what of this the denoiser has no place for, in words."""
        lists = (("parts", self.parts), ("train_fully", self.train_fully))
        valid = {"parts": denoiser.parts(), "train_fully": denoiser.trainable_parts()}
        found = [
            f"adapter.{name}: unknown part '{part}'{did_you_mean(part, valid[name])}"
            for name, parts in lists
            for part in parts
            if part not in valid[name]
        ]
        both = set(self.parts) & set(self.train_fully)
        found += [f"adapter: '{part}' is in both parts and train_fully" for part in sorted(both)]
        if not self.parts and not self.train_fully:
            found.append("adapter: parts and train_fully are both empty, so nothing would train")
        return found

    def inject(self, denoiser: Denoiser, seed: int) -> None:
        """Put fresh factors on the denoiser and let only the chosen parameters train, in float32.

        Factors start as the identity: the denoiser's output does not change.
        """
        denoiser.requires_grad_(False)
        targets = [layer for part in self.parts for layer in denoiser.parts()[part]]
        add_factors(denoiser, targets, self.rank, self.alpha, self.dropout, seed)
        fully = [name for part in self.train_fully for name in denoiser.trainable_parts()[part]]
        for name in fully:
            denoiser.get_submodule(name).float().requires_grad_(True)


def add_factors(
    denoiser: nn.Module,
    layers: Iterable[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Put low-rank factors on linear layers by name; equal seeds give equal factors."""
    targets = sorted(layers)
    if not targets:
        return
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=dropout,
        target_modules=targets,
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(seed, "adapter"))
        inject_adapter_in_model(config, denoiser, adapter_name=ADAPTER_NAME)
    # PEFT gives factors the base's dtype; they train, and are added, in float32.
    for name in targets:
        layer = denoiser.get_submodule(name)
        assert isinstance(layer, LoraLayer)
        layer.lora_A.float()
        layer.lora_B.float()


def trained_parameters(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters that train, as an adapter file names them."""
    return {
        adapter_key(name): parameter
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }


def adapter_key(name: str) -> str:
    """Drop what PEFT puts into a parameter's name."""
    return name.replace(f".{ADAPTER_NAME}.", ".").replace(".base_layer.", ".")


def apply_adapter(denoiser: Denoiser, tensors: Mapping[str, Tensor], alpha: float) -> None:
    """Put a trained adapter on a denoiser without adapters.

    Args:
        denoiser: receives factors and replaced parameters.
        tensors: content of an adapter file.
        alpha: of its factors.

    Raises:
        InputError: a tensor has no place in this denoiser, or another shape.
    """
    require_fit(denoiser, tensors)
    factors = {name for name in tensors if ".lora_A." in name}
    if factors:
        rank = tensors[next(iter(factors))].shape[0]
        add_factors(denoiser, (name.split(".lora_A.")[0] for name in factors), rank, alpha)
    places = {adapter_key(name): p for name, p in denoiser.named_parameters()}
    with torch.no_grad():
        for name, tensor in tensors.items():
            places[name].copy_(tensor)


def require_fit(denoiser: Denoiser, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that was trained on a denoiser of another shape.

    Raises:
        InputError: lists the tensors that do not fit.
    """
    shapes = {name: tuple(p.shape) for name, p in denoiser.named_parameters()}
    wrong = [
        f"{name}: {tuple(tensor.shape)}, not {expected}"
        for name, tensor in tensors.items()
        if (expected := _expected_shape(name, tuple(tensor.shape), shapes)) != tuple(tensor.shape)
    ]
    if wrong:
        listed = "\n  ".join(wrong[:5])
        raise InputError(
            f"adapter: {len(wrong)} of its {len(tensors)} tensors do not fit this base; "
            f"was it trained on another?\n  {listed}"
        )


def _expected_shape(
    name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...] | None:
    layer, _, factor = name.partition(".lora_")
    if not factor:
        return shapes.get(name)
    weight = shapes.get(f"{layer}.weight")
    if weight is None or len(shape) != 2:
        return None
    return (shape[0], weight[1]) if factor.startswith("A") else (weight[0], shape[1])
