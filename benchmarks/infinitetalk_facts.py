"""Ask the public InfiniteTalk code for the numbers that `tests/test_published.py` compares with.

    git clone https://github.com/MeiGen-AI/InfiniteTalk && python -m pip install einops
    python benchmarks/infinitetalk_facts.py InfiniteTalk

Its networks are built in the tiny base's sizes, read the tiny base's files in Wan2.1's own layout,
and answer for inputs that anybody can draw again. Written: `tests/reference/infinitetalk.json`.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "infinitetalk"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import public
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Wav2Vec2Config, Wav2Vec2FeatureExtractor

from kit.batch import Conditions
from kit.models.encoders import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from tests import published
from tests.originals import ORIGINAL_FILES, draw_states, write_original

SPREAD = 0.6
"""Of the tiny base's latents, each way and in all channels; their mean is 0."""


def main() -> None:
    """Ask each network and write down what it says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of github.com/MeiGen-AI/InfiniteTalk")
    checkout: Path = parser.parse_args().checkout
    lack = public.missing(checkout)
    if lack is not None:
        sys.exit(lack)
    sys.path.insert(0, str(checkout))
    networks = public.import_networks(checkout)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = write_original(Path(place), draw_states(published.SEED))
        answers = {name: published.digest(ask(folder)) for name, ask in QUESTIONS.items()}
        for name, speakers in published.SPEAKERS.items():
            answers[name] = published.digest(ask_denoiser(networks, folder, speakers))
        for name, size in published.CACHES.items():
            answers[name] = ask_cache(networks, folder, size)
    published.FACTS.parent.mkdir(exist_ok=True)
    published.FACTS.write_text(json.dumps(answers, indent=1) + "\n")
    print(f"{published.FACTS}: {', '.join(answers)}")


def open_denoiser(networks: Any, folder: Path) -> Any:
    """Load the denoiser."""
    networks.WanModel.enable_teacache = False
    model = networks.WanModel(
        model_type="i2v", in_dim=36, dim=48, ffn_dim=128, freq_dim=64, text_dim=32,
        num_heads=2, num_layers=2, output_dim=32, intermediate_dim=16, context_tokens=4,
    )  # fmt: skip
    model.img_emb = networks.MLPProj(32, 48)
    model.audio_proj = networks.AudioProjModel(
        seq_len=5, seq_len_vf=8, blocks=3, channels=32,
        intermediate_dim=16, output_dim=32, context_tokens=4, norm_output_audio=True,
    )  # fmt: skip
    state: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        state |= load_file(file)
    model.load_state_dict(state)
    return model.eval()


def ask_denoiser(networks: Any, folder: Path, speakers: int) -> Tensor:
    """Predict a velocity. [1, 16, F, H, W]"""
    model, given = open_denoiser(networks, folder), published.conditions(speakers)
    return call(model, *published.noisy_latents(), given)


def ask_cache(networks: Any, folder: Path, size: str) -> dict[str, Any]:
    """Predict the velocities of a chunk with TeaCache, and note which passes were computed."""
    model = open_denoiser(networks, folder)
    model.teacache_init(sample_steps=len(published.cached_levels()), model_scale=size)
    ran: list[int] = []
    model.blocks[0].register_forward_hook(lambda *given: ran.append(len(velocities)))
    velocities: list[Tensor] = []
    for number, sigma in enumerate(published.cached_levels()):
        for given in published.cached_branches().values():
            velocities.append(call(model, published.cached_noisy(number), sigma[None], given))
    computed = "".join(str(int(number in ran)) for number in range(len(velocities)))
    return {**published.digest(torch.cat(velocities)), "computed": computed}


def call(model: Any, noisy: Tensor, sigma: Tensor, given: Conditions) -> Tensor:
    """Ask the denoiser once. [1, 16, F, H, W]"""
    mask = given.reference_mask[..., None, None].expand(-1, -1, -1, *noisy.shape[3:])
    (velocity,) = model(
        [noisy[0]],
        t=1000 * sigma,
        context=[given.text[0]],
        clip_fea=given.image,
        seq_len=48,
        y=torch.cat([mask, given.reference], dim=1),
        audio=given.audio[0],
        ref_target_masks=public.regions(given.speaker_masks[0]),
    )
    return velocity[None]


def open_video(folder: Path) -> tuple[Any, list[Tensor]]:
    """Load the video autoencoder, and the statistics that it is called with."""
    module = importlib.import_module("wan.modules.vae")
    vae = module.WanVAE_(
        dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    vae.load_state_dict(torch.load(folder / ORIGINAL_FILES["vae"], weights_only=True))
    return vae.eval(), [torch.zeros(16), torch.full((16,), 1 / SPREAD)]


def ask_encoder_of_video(folder: Path) -> Tensor:
    """Encode a video. [1, 16, F, h, w]"""
    vae, scale = open_video(folder)
    latents: Tensor = vae.encode(published.video(), scale)
    return latents


def ask_decoder_of_video(folder: Path) -> Tensor:
    """Decode latents and clamp. [1, 3, T, H, W]"""
    vae, scale = open_video(folder)
    pixels: Tensor = vae.decode(published.latents(), scale)
    return pixels.clamp(-1, 1)


def ask_encoder_of_text(folder: Path) -> Tensor:
    """Encode a text, padded to 512 tokens, and cut the padding off. [1, L, D]"""
    public.stand_in("optimum")
    for name in ("quantize", "freeze", "qint8", "requantize"):
        setattr(public.stand_in("optimum.quanto"), name, None)
    torch.cuda.current_device = lambda: 0
    module = importlib.import_module("wan.modules.t5")
    network = module.T5Encoder(
        vocab=384, dim=32, dim_attn=32, dim_ffn=64, num_heads=2, num_layers=2, num_buckets=32,
        shared_pos=False,
    )  # fmt: skip
    network.load_state_dict(torch.load(folder / ORIGINAL_FILES["text_encoder"], weights_only=True))
    tokenizer = AutoTokenizer.from_pretrained(folder / "google" / "umt5-xxl")
    ids = tokenizer(published.TEXT, return_tensors="pt")["input_ids"]
    missing = (0, 512 - ids.shape[1])
    mask = F.pad(torch.ones_like(ids), missing)
    states: Tensor = network.eval()(F.pad(ids, missing), mask)[:, : ids.shape[1]]
    return states


def ask_encoder_of_pictures(folder: Path) -> Tensor:
    """Encode a picture by all layers but the last. [1, K, D]"""
    module = importlib.import_module("wan.modules.clip")
    module.flash_attention = public.attend
    network = module.VisionTransformer(
        image_size=32, patch_size=8, dim=32, mlp_ratio=2, out_dim=8, num_heads=2, num_layers=3,
        activation="gelu",
    )  # fmt: skip
    whole = torch.load(folder / ORIGINAL_FILES["image_encoder"], weights_only=True)
    visual = {k.removeprefix("visual."): v for k, v in whole.items() if k.startswith("visual.")}
    network.load_state_dict(visual)
    square = F.interpolate(published.picture(), (32, 32), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    tokens: Tensor = network.eval()((square / 2 + 0.5 - mean) / std, use_31_block=True)
    return tokens


def ask_encoder_of_speech(folder: Path) -> Tensor:
    """Find the features of a second of speech, 25 frames of all layers. [1, T, M, D]"""
    module = importlib.import_module("src.audio_analysis.wav2vec2")
    config = Wav2Vec2Config.from_pretrained(folder / "audio_encoder", attn_implementation="eager")
    network = module.Wav2Vec2Model(config)
    state = load_file(folder / "audio_encoder" / "m.safetensors")
    network.load_state_dict({k.removeprefix("wav2vec2."): v for k, v in state.items()})
    centred = Wav2Vec2FeatureExtractor(do_normalize=True)(
        published.speech()[0].numpy(), sampling_rate=16_000, return_tensors="pt"
    ).input_values
    layers: list[Tensor] = []
    # What the public code reads as hidden states; newer transformers hand them out another way.
    for layer in network.encoder.layers:
        layer.register_forward_hook(lambda *given: layers.append(first_of(given[-1])))
    network.eval()(centred, seq_len=25, return_dict=True)
    return torch.stack(layers, dim=2)


def first_of(output: Any) -> Tensor:
    """Take the tensor that a layer gives, alone or first of several."""
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


QUESTIONS: dict[str, Callable[[Path], Tensor]] = {
    "video to latents": ask_encoder_of_video,
    "latents to video": ask_decoder_of_video,
    "text": ask_encoder_of_text,
    "picture": ask_encoder_of_pictures,
    "speech": ask_encoder_of_speech,
}

if __name__ == "__main__":
    main()
