"""The tiny base as Wan2.1 and InfiniteTalk publish theirs: their files, and their names in them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kit.models.encoders import draw_network
from kit.models.keys import is_audio, public_name
from kit.models.layouts import ENCODERS, find_part
from kit.models.wan_base import WanBase

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
CPU = torch.device("cpu")
ORIGINAL_FILES = {
    "vae": "Wan2.1_VAE.pth",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}

State = dict[str, Tensor]


def draw_states(seed: int) -> dict[str, State]:
    """Draw a tiny base's weights in float32: the denoiser's, and encoders' by their parts' names.

    Each tensor depends on the seed and its name alone.
    """
    base = WanBase(path=str(TINY_BASE), random_weights=seed, dtype="float32")
    networks: dict[str, nn.Module] = {"denoiser": base.load_denoiser(CPU)}
    for name in ENCODERS:
        networks[name] = draw_network(find_part(name, TINY_BASE), seed, torch.float32)
    return {name: dict(network.state_dict()) for name, network in networks.items()}


def write_original(folder: Path, drawn: dict[str, State]) -> Path:
    """Write all files that Wan2.1's own layout has, InfiniteTalk's, and a speech encoder."""
    write_denoiser(folder, public_denoiser(drawn["denoiser"]), num_shards=7)
    for name, file in ORIGINAL_FILES.items():
        torch.save(ORIGINALS[name](drawn[name]), folder / file)
    write_speech(folder / "audio_encoder", drawn["audio_encoder"])
    write_tiny_configs(folder)
    copy_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def write_tiny_configs(folder: Path) -> None:
    """Say what shapes do not tell: widths of heads, and sizes of layers that are not public."""
    (folder / "image_encoder").mkdir()
    (folder / "image_encoder/config.json").write_text('{"num_attention_heads": 2}')
    (folder / "audio").mkdir()
    (folder / "audio/config.json").write_text('{"audio_dim": 32}')
    (folder / "vae").mkdir()
    statistics = {"latents_mean": [0] * 16, "latents_std": [0.6] * 16}
    (folder / "vae/config.json").write_text(json.dumps(statistics))


def write_denoiser(folder: Path, public: State, *, num_shards: int) -> None:
    trunk = [key for key in public if not is_audio(key)]
    name = "diffusion_pytorch_model-{:05d}-of-{:05d}.safetensors"
    weight_map = {key: name.format(i % num_shards + 1, num_shards) for i, key in enumerate(trunk)}
    for file in set(weight_map.values()):
        save_file({key: public[key] for key in trunk if weight_map[key] == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    audio = {key: value for key, value in public.items() if is_audio(key)}
    save_file(audio, folder / "infinitetalk.safetensors")
    config = {
        "_class_name": "WanModel", "model_type": "i2v", "dim": 48, "num_heads": 2, "ffn_dim": 128,
        "freq_dim": 64, "in_dim": 36, "out_dim": 16, "num_layers": 2, "eps": 1e-6, "text_len": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_speech(folder: Path, state: State) -> None:
    folder.mkdir()
    save_file(
        {f"wav2vec2.{name}": value for name, value in state.items()}, folder / "m.safetensors"
    )
    config = (TINY_BASE / "audio_encoder" / "config.json").read_text()
    (folder / "config.json").write_text(config)


def copy_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in (TINY_BASE / "tokenizer").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def public_denoiser(state: State) -> State:
    return {public_name(name) or name: value for name, value in state.items()}


def rename(name: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


def original_text(state: State) -> State:
    """Give umT5's tensors the names of Wan2.1's own file."""
    pairs = (
        ("shared", "token_embedding"), ("encoder.final_layer_norm", "norm"),
        ("encoder.block.", "blocks."), (".layer.0.layer_norm", ".norm1"),
        (".layer.1.layer_norm", ".norm2"), (".layer.0.SelfAttention.", ".attn."),
        (".layer.1.DenseReluDense.", ".ffn."), (".ffn.wi_0", ".ffn.gate.0"),
        (".ffn.wi_1", ".ffn.fc1"), (".ffn.wo", ".ffn.fc2"),
        (".attn.relative_attention_bias", ".pos_embedding.embedding"),
    )  # fmt: skip
    return {rename(n, *pairs): v for n, v in state.items() if n != "encoder.embed_tokens.weight"}


def original_image(state: State) -> State:
    """Give CLIP's tensors the names of Wan2.1's own file, which holds the text encoder as well."""
    pairs = (
        ("embeddings.class_embedding", "cls_embedding"), ("pre_layrnorm", "pre_norm"),
        ("embeddings.position_embedding.weight", "pos_embedding"), ("layer_norm", "norm"),
        ("embeddings.patch_embedding", "patch_embedding"), ("post_layernorm", "post_norm"),
        ("encoder.layers.", "transformer."), ("self_attn.out_proj", "attn.proj"),
        ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"), ("self_attn.q_proj", "attn.to_qkv"),
    )  # fmt: skip
    renamed: State = {}
    for name, value in state.items():
        if "q_proj" in name:
            value = torch.cat([state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
        if "k_proj" not in name and "v_proj" not in name:
            renamed[f"visual.{rename(name, *pairs)}"] = value
    for name in ("visual.cls_embedding", "visual.pos_embedding"):
        renamed[name] = renamed[name].reshape(1, -1, renamed[name].shape[-1])
    others = {"log_scale": torch.ones(()), "visual.head": torch.ones(32, 8)}
    return renamed | others | {"textual.token_embedding.weight": torch.ones(4, 4)}


def original_video(state: State) -> State:
    """Give the video autoencoder's tensors the names of Wan2.1's own file."""
    resnets = {int(n.split(".")[4]) for n in state if n.startswith("decoder.up_blocks.0.resnets.")}
    stage = len(resnets) + 1
    inner = (
        (".norm1.", ".residual.0."), (".conv1.", ".residual.2."), (".norm2.", ".residual.3."),
        (".conv2.", ".residual.6."), (".conv_shortcut.", ".shortcut."),
    )  # fmt: skip
    outer = (
        ("encoder.down_blocks.", "encoder.downsamples."), (".mid_block.resnets.0.", ".middle.0."),
        (".mid_block.attentions.0.", ".middle.1."), (".mid_block.resnets.1.", ".middle.2."),
        (".conv_in.", ".conv1."), (".norm_out.", ".head.0."), (".conv_out.", ".head.2."),
    )  # fmt: skip
    renamed: State = {}
    for name, value in state.items():
        new = rename(name, *inner)
        if new.startswith("decoder.up_blocks."):
            _, _, block, kind, number, rest = new.split(".", 5)
            place = int(number) if kind == "resnets" else stage - 1
            new = f"decoder.upsamples.{int(block) * stage + place}.{rest}"
        elif new.startswith("quant_conv") or new.startswith("post_quant_conv"):
            new = rename(new, ("post_quant_conv", "conv2"), ("quant_conv", "conv1"))
        else:
            new = rename(new, *outer)
        renamed[new] = value
    return renamed


ORIGINALS: dict[str, Callable[[State], State]] = {
    "vae": original_video,
    "text_encoder": original_text,
    "image_encoder": original_image,
}
