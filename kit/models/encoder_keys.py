"""Names of the encoders' tensors: Wan2.1's own to those of diffusers and transformers.

`#` stands for a number, the same on both sides. Keys that are named like ours already stay as they
are, without what other programs put before them. Sources: Wan2.1, diffusers 0.42, transformers 5.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from kit.models.keys import Names

Table = Mapping[str, str | tuple[str, ...]]
"""Names of modules or tensors to ours; several names are pieces of one tensor, from above."""


def below(theirs: str, ours: str, table: Mapping[str, str]) -> dict[str, str]:
    """Put a module's name before each name of a table."""
    return {f"{theirs}.{key}": f"{ours}.{value}" for key, value in table.items()}


TEXT: Table = {
    "token_embedding": "shared",
    "encoder.embed_tokens": "shared",
    "norm": "encoder.final_layer_norm",
    "blocks.#.norm1": "encoder.block.#.layer.0.layer_norm",
    **below(
        "blocks.#.attn",
        "encoder.block.#.layer.0.SelfAttention",
        {"q": "q", "k": "k", "v": "v", "o": "o"},
    ),
    "blocks.#.pos_embedding.embedding": (
        "encoder.block.#.layer.0.SelfAttention.relative_attention_bias"
    ),
    "blocks.#.norm2": "encoder.block.#.layer.1.layer_norm",
    **below(
        "blocks.#.ffn",
        "encoder.block.#.layer.1.DenseReluDense",
        {"gate.0": "wi_0", "fc1": "wi_1", "fc2": "wo"},
    ),
}

IMAGE: Table = {
    "cls_embedding": "embeddings.class_embedding",
    "pos_embedding": "embeddings.position_embedding.weight",
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
    "transformer.#.attn.to_qkv": tuple(f"encoder.layers.#.self_attn.{x}_proj" for x in "qkv"),
    **below(
        "transformer.#",
        "encoder.layers.#",
        {
            "norm1": "layer_norm1",
            "norm2": "layer_norm2",
            "attn.proj": "self_attn.out_proj",
            "mlp.0": "mlp.fc1",
            "mlp.2": "mlp.fc2",
        },
    ),
}

SPEECH: Table = below(
    "encoder.pos_conv_embed.conv",
    "encoder.pos_conv_embed.conv.parametrizations.weight",
    {"weight_g": "original0", "weight_v": "original1"},
)
"""Files of that age call the two parts of weight normalisation by their former names."""

RESNET = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
RESAMPLING = {"resample.1": "resample.1", "time_conv": "time_conv"}
HALF = {
    "conv1": "conv_in",
    "head.0": "norm_out",
    "head.2": "conv_out",
    **below("middle.0", "mid_block.resnets.0", RESNET),
    **below(
        "middle.1",
        "mid_block.attentions.0",
        {"norm": "norm", "to_qkv": "to_qkv", "proj": "proj"},
    ),
    **below("middle.2", "mid_block.resnets.1", RESNET),
}
VIDEO: Table = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    **below("encoder", "encoder", HALF),
    **below("decoder", "decoder", HALF),
    **below("encoder.downsamples.#", "encoder.down_blocks.#", RESNET | RESAMPLING),
}
"""All but the decoder's upsampling, whose numbers depend on its depth; see `video_names`."""

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_UPSAMPLING = re.compile(r"decoder\.upsamples\.(\d+)\.resample\.")


@dataclass(frozen=True)
class Dialects:
    """What files call the tensors of one encoder.

    Attributes:
        table: their names to ours.
        ours: how names begin that are ours already.
        prefixes: what programs put before names.
    """

    table: Table
    ours: tuple[str, ...]
    prefixes: tuple[str, ...] = ()

    def names(self, keys: Collection[str]) -> Names:
        """Translate keys; unknown ones are left out."""
        found = {key: self._name(key) for key in keys}
        return {key: names for key, names in found.items() if names}

    def _name(self, key: str) -> tuple[str, ...]:
        name = key.removeprefix(next((p for p in self.prefixes if key.startswith(p)), ""))
        return exchange(name, self.table) or ((name,) if name.startswith(self.ours) else ())


TEXT_DIALECTS = Dialects(
    table=TEXT,
    ours=("shared.", "encoder.block.", "encoder.final_layer_norm."),
)
IMAGE_DIALECTS = Dialects(
    table=IMAGE,
    ours=("embeddings.", "pre_layrnorm.", "post_layernorm.", "encoder.layers."),
    prefixes=("vision_model.", "visual."),
)
SPEECH_DIALECTS = Dialects(
    table=SPEECH,
    ours=("feature_extractor.", "feature_projection.", "encoder.", "masked_spec_embed"),
    prefixes=("wav2vec2.",),
)
VIDEO_DIALECTS = Dialects(
    table=VIDEO,
    ours=(
        "encoder.conv_in.",
        "encoder.down_blocks.",
        "encoder.mid_block.",
        "encoder.norm_out.",
        "encoder.conv_out.",
        "quant_conv.",
        "post_quant_conv.",
        "decoder.conv_in.",
        "decoder.mid_block.",
        "decoder.up_blocks.",
        "decoder.norm_out.",
        "decoder.conv_out.",
    ),
    prefixes=("model.",),
)

UNUSED_TEXT = {
    "spiece_model": "the tokenizer, which is read from its own folder",
    "decoder.*": "writes text",
    "lm_head.*": "writes text",
}
UNUSED_IMAGE = {
    "*position_ids": "numbers from 0 up",
    "*head": "compares pictures with texts",
    "visual_projection.*": "compares pictures with texts",
    "log_scale": "compares pictures with texts",
    "logit_scale": "compares pictures with texts",
    "textual.*": "CLIP's text encoder",
    "text_model.*": "CLIP's text encoder",
    "text_projection.*": "CLIP's text encoder",
}
UNUSED_SPEECH = {
    "quantizer.*": "for pretraining",
    "project_q.*": "for pretraining",
    "project_hid.*": "for pretraining",
    "lm_head.*": "writes what is said",
}
"""Keys that a network has no place for, as patterns, and why."""


def video_names(keys: Collection[str]) -> Names:
    """Translate keys of the video autoencoder; unknown ones are left out.

    Wan2.1 numbers the parts of the decoder's stages in one row: each has as many residual blocks
    as lie before the first upsampling, and then, but for the last, an upsampling.
    """
    ends = {int(match.group(1)) for key in keys if (match := _UPSAMPLING.search(key))}
    stage = 1 + min(ends, default=0)
    upsampling: dict[str, str] = {}
    for number in range(stage * (1 + len(ends))):
        block, place = divmod(number, stage)
        inner, table = f"resnets.{place}", RESNET
        if place == stage - 1:
            inner, table = "upsamplers.0", RESAMPLING
        ours = f"decoder.up_blocks.{block}.{inner}"
        upsampling |= below(f"decoder.upsamples.{number}", ours, table)
    return replace(VIDEO_DIALECTS, table={**VIDEO, **upsampling}).names(keys)


def exchange(name: str, table: Table) -> tuple[str, ...]:
    """Look up a tensor, or the module that it belongs to; empty if the table holds neither."""
    module, dot, leaf = name.rpartition(".")
    for entry, rest in ((name, ""), (module, dot + leaf)):
        number = _NUMBER.search(entry)
        found = table.get(entry) or table.get(_NUMBER.sub(".#", entry, count=1))
        if found:
            names = (found,) if isinstance(found, str) else found
            value = number.group()[1:] if number else ""
            return tuple(ours.replace("#", value) + rest for ours in names)
    return ()
