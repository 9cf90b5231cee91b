"""Configurations of networks: what a file of weights tells by its shapes, and what it cannot tell.

Each network has a table of entries that follow from shapes, and constants of the public models for
those that do not. What a config.json says wins over both.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by our names."""

Config = Mapping[str, Any]

Rule = Callable[[Shapes, Config], Any]
"""Computes an entry from shapes and from the entries known so far; ValueError if it cannot."""


@dataclass(frozen=True)
class Sizes:
    """How to find the configuration of one network.

    Attributes:
        rules: entries that follow from shapes, in an order in which each may use those before it.
        constants: entries of the public models.
    """

    rules: Mapping[str, Rule]
    constants: Config


def axis(name: str, number: int) -> Rule:
    """Take the length of a tensor's axis."""

    def rule(shapes: Shapes, _: Config) -> int:
        shape = shapes.get(name, ())
        if not -len(shape) <= number < len(shape):
            raise ValueError(f"there is no fitting tensor {name}")
        return shape[number]

    return rule


def count(prefix: str) -> Rule:
    """Count the numbered modules whose names begin so."""
    return lambda shapes, _: _count(shapes, prefix)


def each(prefix: str, name: str, number: int) -> Rule:
    """Take the length of an axis in each of the numbered modules whose names begin so."""
    return lambda shapes, config: [
        axis(f"{prefix}{module}.{name}", number)(shapes, config)
        for module in range(_count(shapes, prefix))
    ]


def divided(rule: Rule, divisor: int | str) -> Rule:
    """Divide a length by a number, or by an entry known so far; nothing may be left over."""

    def divide(shapes: Shapes, config: Config) -> int:
        length, share = rule(shapes, config), config.get(str(divisor), divisor)
        if length % share:
            raise ValueError(f"{length} is no multiple of {share}, which public models have")
        quotient: int = length // share
        return quotient

    return divide


def has(name: str) -> Rule:
    """Tell whether there is a tensor of this name."""
    return lambda shapes, _: name in shapes


TRANSFORMER = Sizes(
    rules={
        "num_layers": count("transformer.blocks."),
        "in_channels": axis("transformer.patch_embedding.weight", 1),
        "out_channels": divided(axis("transformer.proj_out.weight", 0), 4),
        "text_dim": axis("transformer.condition_embedder.text_embedder.linear_1.weight", 1),
        "freq_dim": axis("transformer.condition_embedder.time_embedder.linear_1.weight", 1),
        "image_dim": axis("transformer.condition_embedder.image_embedder.norm1.weight", 0),
        "added_kv_proj_dim": axis("transformer.blocks.0.attn2.add_k_proj.weight", 1),
        "ffn_dim": axis("transformer.blocks.0.ffn.net.0.proj.weight", 0),
        "num_attention_heads": divided(
            axis("transformer.patch_embedding.weight", 0), "attention_head_dim"
        ),
    },
    constants={
        "attention_head_dim": 128,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "rope_max_seq_len": 1024,
    },
)
"""Wan's transformer, in the words of diffusers."""

AUDIO = Sizes(
    rules={
        "intermediate_dim": axis("audio_proj.proj2.weight", 0),
        "output_dim": axis("audio_proj.norm.weight", 0),
        "context_tokens": divided(axis("audio_proj.proj3.weight", 0), "output_dim"),
        "num_layers": divided(divided(axis("audio_proj.proj1.weight", 1), 5), "audio_dim"),
    },
    constants={"audio_dim": 768},
)
"""The audio parts, as `AudioSizes` has them."""

TEXT = Sizes(
    rules={
        "vocab_size": axis("shared.weight", 0),
        "d_model": axis("shared.weight", 1),
        "num_layers": count("encoder.block."),
        "num_heads": axis(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1
        ),
        "relative_attention_num_buckets": axis(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 0
        ),
        "d_kv": divided(axis("encoder.block.0.layer.0.SelfAttention.q.weight", 0), "num_heads"),
        "d_ff": axis("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", 0),
    },
    constants={"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6},
)
"""umT5's encoder, in the words of transformers."""


def _image_size(shapes: Shapes, config: Config) -> int:
    # One position more than there are patches.
    num_positions = axis("embeddings.position_embedding.weight", -2)(shapes, config)
    side: int = config["patch_size"] * math.isqrt(num_positions - 1)
    return side


IMAGE = Sizes(
    rules={
        "hidden_size": axis("embeddings.class_embedding", -1),
        "num_channels": axis("embeddings.patch_embedding.weight", 1),
        "patch_size": axis("embeddings.patch_embedding.weight", -1),
        "image_size": _image_size,
        "num_hidden_layers": count("encoder.layers."),
        "intermediate_size": axis("encoder.layers.0.mlp.fc1.weight", 0),
        "num_attention_heads": divided(axis("embeddings.class_embedding", -1), 80),
    },
    constants={"hidden_act": "gelu", "layer_norm_eps": 1e-5},
)
"""CLIP's image encoder, in the words of transformers."""


def _dim_mult(shapes: Shapes, config: Config) -> list[int]:
    # The decoder goes from the last stage to the first.
    widths = each("decoder.up_blocks.", "resnets.0.conv2.weight", 0)(shapes, config)
    return [width // config["base_dim"] for width in reversed(widths)]


def _temperal_downsample(shapes: Shapes, _: Config) -> list[bool]:
    stages = range(_count(shapes, "decoder.up_blocks.") - 1)
    return [
        f"decoder.up_blocks.{stage}.upsamplers.0.time_conv.weight" in shapes
        for stage in reversed(stages)
    ]


VIDEO = Sizes(
    rules={
        "base_dim": axis("encoder.conv_in.weight", 0),
        "z_dim": axis("post_quant_conv.weight", 0),
        "num_res_blocks": lambda shapes, _: _count(shapes, "decoder.up_blocks.0.resnets.") - 1,
        "dim_mult": _dim_mult,
        "temperal_downsample": _temperal_downsample,
    },
    constants={"attn_scales": [], "dropout": 0.0},
)
"""Wan's video autoencoder, in the words of diffusers, which has the statistics of its latents."""

SPEECH = Sizes(
    rules={
        "conv_dim": each("feature_extractor.conv_layers.", "conv.weight", 0),
        "conv_kernel": each("feature_extractor.conv_layers.", "conv.weight", 2),
        "conv_bias": has("feature_extractor.conv_layers.0.conv.bias"),
        "hidden_size": axis("feature_projection.projection.weight", 0),
        "num_hidden_layers": count("encoder.layers."),
        "intermediate_size": axis("encoder.layers.0.feed_forward.intermediate_dense.weight", 0),
        "num_attention_heads": divided(axis("feature_projection.projection.weight", 0), 64),
        "num_conv_pos_embeddings": axis(
            "encoder.pos_conv_embed.conv.parametrizations.weight.original1", 2
        ),
        "num_conv_pos_embedding_groups": lambda shapes, config: (
            config["hidden_size"]
            // axis("encoder.pos_conv_embed.conv.parametrizations.weight.original1", 1)(
                shapes, config
            )
        ),
    },
    constants={
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "feat_extract_norm": "group",
        "do_stable_layer_norm": False,
    },
)
"""wav2vec 2.0 of the base size, in the words of transformers."""

ORIGINAL = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "num_layers": "num_layers",
    "eps": "eps",
}
"""Entries of Wan2.1's own config.json to those of diffusers."""


def translate_config(config: Config, file: Path) -> dict[str, Any]:
    """Translate Wan2.1's own configuration of the transformer; nothing is left of another one.

    Raises:
        InputError: it is not the image-to-video model.
    """
    if "dim" not in config:
        return {}
    kind = config.get("model_type", "i2v")
    if kind != "i2v":
        raise InputError(f"'{file}': model_type is '{kind}'; valid: i2v (Wan2.1 image-to-video)")
    ours = {ORIGINAL[name]: value for name, value in config.items() if name in ORIGINAL}
    return {**ours, "attention_head_dim": config["dim"] // config["num_heads"]}


def wan_config(config: Config, text_length: int) -> dict[str, Any]:
    """Write Wan2.1's own configuration of a transformer; the inverse of `translate_config`."""
    theirs = {name: config[ours] for name, ours in ORIGINAL.items() if ours in config}
    width = config["num_attention_heads"] * config["attention_head_dim"]
    kind = {"_class_name": "WanModel", "model_type": "i2v"}
    return {**kind, "dim": width, "text_len": text_length, **theirs}


def complete_config(sizes: Sizes, given: Config, shapes: Shapes, place: str) -> dict[str, Any]:
    """Find the configuration of a network.

    Args:
        sizes: of its kind.
        given: entries of a config.json, which win.
        shapes: of its stored tensors; without any, nothing but constants is added.
        place: where the weights are from, for messages.

    Raises:
        InputError: an entry is not given and does not follow from the shapes.
    """
    config = {**sizes.constants, **given}
    rules = sizes.rules if shapes else {}
    for entry, rule in rules.items():
        if entry not in given:
            try:
                config[entry] = rule(shapes, config)
            except ValueError as error:
                raise InputError(
                    f"{place}: cannot tell {entry}: {error}; a config.json can say it"
                ) from error
    return config


def _count(shapes: Shapes, prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
