"""The training loop as people write it around diffusers and PEFT, for Wan and for InfiniteTalk."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import public
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from peft import LoraConfig, inject_adapter_in_model
from shape import CLIP_NORM, OBJECTIVE, RANK, RATE, SEED, Shape, start_factors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kit.batch import Batch
from kit.guidance import pad_text
from kit.models.keys import public_name
from kit.models.wan import Wan
from kit.objectives.flow_matching import draw_noise

Predict = Callable[[Tensor, Tensor, Batch], Tensor]
"""Finds the velocity from noisy latents, their level and the conditions."""


def prepare(shape: Shape, checkout: Path | None) -> tuple[nn.Module, Predict]:
    """Load the peer's network with our weights, and put an adapter on it."""
    ours = shape.draw_network()
    layers = [name for part in shape.parts for name in ours.parts()[part]]
    if checkout is None:
        model = diffusers_network(ours, shape)
        layers = [name.removeprefix("transformer.") for name in layers]
        predict = partial(predict_by_diffusers, model, shape)
    else:
        model = public_network(ours, shape, checkout)
        layers = [public_name(f"{name}.weight").removesuffix(".weight") for name in layers]
        predict = partial(predict_by_infinitetalk, model, shape)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=layers)
    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    start_factors(model, layers)
    return model.train(), predict


def train(model: nn.Module, predict: Predict, batches: list[Batch]) -> Iterator[float]:
    """Train a step for each batch, and give its loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)
    for batch in batches:
        noise, sigma = draw_noise(batch, SEED), OBJECTIVE.draw_sigma(batch, SEED)
        level = sigma.view(-1, 1, 1, 1, 1)
        noisy = (1 - level) * batch.latents + level * noise
        velocity = predict(noisy, sigma, batch)
        loss = F.mse_loss(velocity.float(), noise - batch.latents)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def diffusers_network(ours: Wan, shape: Shape) -> WanTransformer3DModel:
    """Build diffusers' network with our weights."""
    config = {k: v for k, v in ours.transformer.config.items() if not k.startswith("_")}
    with torch.device("meta"):
        model = WanTransformer3DModel(**config)
        rope = model.rope
    weights = ours.transformer.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()}, assign=True)
    model.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    if shape.checkpoint:
        model.enable_gradient_checkpointing()
    return model.requires_grad_(False)


def predict_by_diffusers(
    model: WanTransformer3DModel, shape: Shape, noisy: Tensor, sigma: Tensor, batch: Batch
) -> Tensor:
    """Predict the velocity of image-to-video without sound."""
    given, size = batch.conditions, noisy.shape[3:]
    mask = given.reference_mask[..., None, None].expand(-1, -1, -1, *size)
    with torch.autocast("cpu", shape.torch_dtype, enabled=shape.uses_autocast):
        velocity: Tensor = model(
            hidden_states=torch.cat([noisy, mask, given.reference], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=pad_text(given.text, 512),
            encoder_hidden_states_image=given.image,
            return_dict=False,
        )[0]
    return velocity


def public_network(ours: Wan, shape: Shape, checkout: Path) -> Any:
    """Build InfiniteTalk's network with our weights; its blocks as its trainers wrap them.

    The rest insists on float32 for the time and chooses its dtypes itself.
    """
    model = public.imitate(checkout, ours, shape.torch_dtype)
    autocast = torch.autocast("cpu", shape.torch_dtype, enabled=shape.uses_autocast)
    for block in model.blocks:
        block.forward = autocast(block.forward)
        if shape.checkpoint:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return model


def predict_by_infinitetalk(
    model: Any, shape: Shape, noisy: Tensor, sigma: Tensor, batch: Batch
) -> Tensor:
    """Predict the velocity of one speaker's video."""
    dtype, size = shape.torch_dtype, noisy.shape[3:]
    given = batch.conditions.to(noisy.device, dtype)
    mask = given.reference_mask[..., None, None].expand(-1, -1, -1, *size)
    velocity: Tensor = model(
        [noisy[0].to(dtype)],
        t=1000 * sigma,
        context=[given.text[0]],
        audio=given.audio[0],
        clip_fea=given.image,
        seq_len=noisy.shape[2] * size[0] * size[1] // 4,
        y=torch.cat([mask, given.reference], dim=1),
        ref_target_masks=public.regions(given.speaker_masks[0]),
    )[0]
    return velocity[None]
