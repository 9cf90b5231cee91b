"""Names of Wan's tensors: ours (diffusers' below `transformer.`) and those of the public weights.

Both tables hold whole dotted prefixes and are never searched for substrings: `cross_attn` is also
a part of `audio_cross_attn`. Sources: Wan2.1, InfiniteTalk and diffusers 0.42.
"""

from collections.abc import Collection, Mapping

TRUNK = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
}
"""Ours to public, outside the blocks."""

BLOCK = {
    "scale_shift_table": "modulation",
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn1": "self_attn",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "attn2": "cross_attn",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "ffn": "ffn",
    "norm_x": "norm_x",
    "audio_cross_attn": "audio_cross_attn",
}
"""Ours to public, inside a block. The affine norm is `norm2` here and `norm3` there."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""What other programs put before public names."""

AUDIO = "audio_proj"
AUDIO_ALIAS = "multitalk_audio_proj"
"""What kijai's ComfyUI nodes call the projector."""

UNUSED = {"*.attn2.norm_added_q.weight": "a norm that diffusers exports and no computation reads"}
"""Keys that a network has no place for, and why."""

Names = Mapping[str, tuple[str, ...]]
"""Keys of a file to our names; a tensor of several names is cut evenly along its rows."""

_TRUNK_BACK = {public: ours for ours, public in TRUNK.items()}
_BLOCK_BACK = {public: ours for ours, public in BLOCK.items()}


def is_audio(name: str) -> bool:
    """Tell whether a parameter is one of those that InfiniteTalk added to Wan."""
    return "audio" in name or "norm_x" in name


def public_name(name: str) -> str | None:
    """Translate our name of a tensor or module to the public one; None if it has none."""
    if _is_below(name, AUDIO):
        return name
    if not name.startswith("transformer."):
        return None
    return _translate(name.removeprefix("transformer."), TRUNK, BLOCK)


def our_name(key: str) -> str | None:
    """Translate a key of a weight file, public or diffusers', to our name; None if unknown."""
    prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
    name = key.removeprefix(prefix)
    if _is_below(name, AUDIO_ALIAS):
        return AUDIO + name.removeprefix(AUDIO_ALIAS)
    if _is_below(name, AUDIO):
        return name
    ours = _translate(name, _TRUNK_BACK, _BLOCK_BACK)
    if ours is None and _translate(name, TRUNK, BLOCK) is not None:
        ours = name
    return None if ours is None else f"transformer.{ours}"


def denoiser_names(keys: Collection[str]) -> Names:
    """Translate keys of the denoiser, in any of its dialects; unknown ones are left out."""
    return {key: (name,) for key in keys if (name := our_name(key)) is not None}


def _translate(name: str, trunk: dict[str, str], block: dict[str, str]) -> str | None:
    if not _is_below(name, "blocks"):
        return _exchange(name, trunk)
    _, number, inner = (*name.split(".", 2), "", "")[:3]
    if not inner:
        return name
    exchanged = _exchange(inner, block)
    return None if exchanged is None else f"blocks.{number}.{exchanged}"


def _exchange(name: str, table: dict[str, str]) -> str | None:
    entries = [entry for entry in table if _is_below(name, entry)]
    if not entries:
        return None
    longest = max(entries, key=len)
    return table[longest] + name.removeprefix(longest)


def _is_below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")
