"""The frozen encoders: parity with the reference programs, loading, and independence of batches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
)

from kit.draws import draw_normal
from kit.errors import InputError
from kit.models.encoders import (
    ImageEncoder,
    SpeechEncoder,
    TextEncoder,
    VideoEncoder,
    WanEncoders,
    clean_text,
    draw_network,
    load_network,
)
from kit.models.layouts import ENCODERS, find_layout, find_part
from tests.outside import reference

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
CPU = torch.device("cpu")


def make_encoders(folder: Path = TINY_BASE, random_weights: int | None = 7) -> WanEncoders:
    return WanEncoders(
        layout=find_layout(folder, {}),
        device=CPU,
        text_dtype=torch.float32,
        fps=25,
        text_length=512,
        random_weights=random_weights,
    )


@pytest.fixture(scope="module")
def encoders() -> WanEncoders:
    return make_encoders()


def load_reference(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Read weights, other tensors and facts of a file of reference outputs."""
    path = reference(f"{name}.safetensors")
    tensors = load_file(path)
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if "weights/" in k}
    with safe_open(path, "pt") as reader:
        return weights, tensors, json.loads(reader.metadata()["meta"])


def rename(name: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        name = name.replace(old, new)
    return name


@torch.no_grad()
def test_video_encoder_equals_the_reference() -> None:
    weights, tensors, facts = load_reference("vae")
    vae = AutoencoderKLWan(base_dim=facts["dim"], z_dim=16)
    vae.load_state_dict(convert_wan_vae_to_diffusers(weights))  # type: ignore[no-untyped-call]
    encoder = VideoEncoder(vae)
    latents = encoder.encode(tensors["inputs/video"][0])
    video = encoder.decode(tensors["outputs/latent"])
    assert (latents - tensors["outputs/latent"]).abs().max() < 1e-4
    assert (video - tensors["outputs/video"]).abs().max() < 1e-4


@torch.no_grad()
def test_text_encoder_equals_the_reference() -> None:
    weights, tensors, _ = load_reference("t5")
    config = UMT5Config(
        vocab_size=120, d_model=48, d_kv=8, d_ff=80, num_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    network = UMT5EncoderModel(config).train(False)
    names = (
        ("token_embedding", "shared"), ("blocks.", "encoder.block."),
        (".norm1.", ".layer.0.layer_norm."), (".norm2.", ".layer.1.layer_norm."),
        (".attn.", ".layer.0.SelfAttention."), ("ffn.gate.0", "layer.1.DenseReluDense.wi_0"),
        ("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias"),
        ("ffn.fc1", "layer.1.DenseReluDense.wi_1"), ("ffn.fc2", "layer.1.DenseReluDense.wo"),
    )  # fmt: skip
    state = {rename(name, *names): value for name, value in weights.items()}
    state["encoder.final_layer_norm.weight"] = state.pop("norm.weight")
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    network.load_state_dict(state)
    tokenizer = AutoTokenizer.from_pretrained(TINY_BASE / "tokenizer")
    encoder = TextEncoder(network, tokenizer, max_length=512)
    for ids, mask, expected in zip(
        tensors["inputs/ids"], tensors["inputs/mask"], tensors["outputs/hidden"], strict=True
    ):
        length = int(mask.sum())
        assert (encoder.encode_tokens(ids[:length]) - expected[:length]).abs().max() < 1e-4


@torch.no_grad()
def test_image_encoder_equals_the_reference() -> None:
    weights, tensors, _ = load_reference("clip")
    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        image_size=56, patch_size=14, hidden_act="gelu",
    )  # fmt: skip
    network = CLIPVisionModel(config).train(False)
    names = (
        ("transformer.", "encoder.layers."), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
        ("attn.proj", "self_attn.out_proj"), ("attn.to_qkv", "self_attn.to_qkv"),
        ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"), ("pre_norm", "pre_layrnorm"),
        ("post_norm", "post_layernorm"), ("cls_embedding", "embeddings.class_embedding"),
        ("pos_embedding", "embeddings.position_embedding.weight"),
        ("patch_embedding.weight", "embeddings.patch_embedding.weight"),
    )  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        ours = rename(name, *names)
        parts = value.chunk(3) if "to_qkv" in ours else (value,)
        letters = "qkv" if "to_qkv" in ours else "-"
        for letter, part in zip(letters, parts, strict=True):
            state[ours.replace("to_qkv", f"{letter}_proj")] = part
    state.pop("head")
    state["embeddings.class_embedding"] = state["embeddings.class_embedding"].flatten()
    position = "embeddings.position_embedding.weight"
    state[position] = state[position][0]
    network.load_state_dict(state)
    features = ImageEncoder(network).encode(tensors["inputs/video"][0, :, 0])
    assert (features - tensors["outputs/features"][0]).abs().max() < 1e-5


@torch.no_grad()
def test_speech_encoder_equals_the_reference() -> None:
    weights, tensors, facts = load_reference("wav2vec")
    network = Wav2Vec2Model(Wav2Vec2Config.from_dict(facts["config"])).train(False)
    network.load_state_dict(weights)
    features = SpeechEncoder(network, fps=25).encode(tensors["inputs/waveform"])
    assert features.shape == tensors["outputs/embedding"].shape
    assert (features - tensors["outputs/embedding"]).abs().max() < 1e-4


def test_shapes(encoders: WanEncoders) -> None:
    video = torch.zeros(1, 3, 9, 32, 48)
    latents = encoders.encode_video(video)
    assert latents.shape == (1, 16, 3, 4, 6)
    assert encoders.decode_video(latents).shape == video.shape
    assert encoders.encode_video(video[:, :, :1]).shape == (1, 16, 1, 4, 6)
    assert encoders.encode_image(video[:, :, 0]).shape == (1, 17, 32)
    assert encoders.encode_speech(torch.zeros(2, 16_639)).shape == (2, 25, 3, 32)


def test_latents_are_scaled_by_the_published_statistics(encoders: WanEncoders) -> None:
    latents = draw_normal((1, 16, 1, 4, 4), 1)
    plain = make_encoders()._video.vae
    expected = plain.decode(latents * 0.6).sample.clamp(-1, 1)
    assert torch.equal(encoders.decode_video(latents), expected)
    assert expected.max() == 1


def test_nothing_depends_on_the_rest_of_the_batch(encoders: WanEncoders) -> None:
    video = draw_normal((2, 3, 5, 32, 32), 1).clamp(-1, 1)
    speech = draw_normal((2, 8_000), 2)
    texts = ["A man talks.", "A woman sings to a large crowd at night."]
    for i in range(2):
        one = slice(i, i + 1)
        assert torch.equal(encoders.encode_video(video)[one], encoders.encode_video(video[one]))
        frame = video[:, :, 0]
        assert torch.equal(encoders.encode_image(frame)[one], encoders.encode_image(frame[one]))
        assert torch.equal(encoders.encode_speech(speech)[one], encoders.encode_speech(speech[one]))
        assert torch.equal(encoders.encode_text(texts)[i], encoders.encode_text(texts[one])[0])


def test_loudness_of_a_track_does_not_matter_but_silence_does(encoders: WanEncoders) -> None:
    speech = draw_normal((1, 8_000), 2)
    features = encoders.encode_speech(speech)
    torch.testing.assert_close(encoders.encode_speech(3 * speech + 1), features)
    assert not torch.allclose(encoders.encode_speech(0 * speech), features)


def test_texts_have_their_real_length(encoders: WanEncoders) -> None:
    short, long, empty = encoders.encode_text(["abc", "x" * 600, ""])
    assert [len(states) for states in (short, long, empty)] == [4, 512, 1]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n\t man ", "a man"),
        ("Tom &amp;amp; Eve", "Tom & Eve"),
        ("caf\u00c3\u00a9", "caf\u00e9"),
    ],
)
def test_clean_text(text: str, clean: str) -> None:
    assert clean_text(text) == clean


def test_networks_are_read_when_needed_and_can_be_released(tmp_path: Path) -> None:
    encoders = make_encoders(tmp_path, random_weights=None)
    with pytest.raises(InputError, match="no image encoder: get models_clip"):
        encoders.encode_image(torch.zeros(1, 3, 32, 32))
    encoders = make_encoders()
    picture = torch.zeros(1, 3, 32, 32)
    before = encoders.encode_image(picture)
    network = encoders._image.network
    assert encoders._image.network is network
    encoders.release()
    assert encoders._image.network is not network
    assert torch.equal(encoders.encode_image(picture), before)


def test_drawing_weights_leaves_other_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    draw_network(find_part("image_encoder", TINY_BASE), 1, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ENCODERS)
def test_saved_networks_load(tmp_path: Path, name: str) -> None:
    drawn = draw_network(find_part(name, TINY_BASE), 1, torch.float32)
    drawn.save_pretrained(tmp_path / name)
    loaded = load_network(find_part(name, tmp_path), torch.float32, CPU).state_dict()
    assert loaded.keys() == drawn.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in drawn.state_dict().items())


def test_speech_encoder_loads_from_pretraining_weights(tmp_path: Path) -> None:
    config = Wav2Vec2Config.from_pretrained(TINY_BASE / "audio_encoder")
    whole = Wav2Vec2ForPreTraining(config)
    whole.save_pretrained(tmp_path / "audio_encoder")
    file = tmp_path / "audio_encoder" / "model.safetensors"
    weight_norm = (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    )
    # Files of that age call the two parts of weight normalisation by their former names.
    save_file(
        {rename(name, *weight_norm): value for name, value in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    part = find_part("audio_encoder", tmp_path)
    loaded = load_network(part, torch.float32, CPU).state_dict()
    expected = whole.wav2vec2.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_image_encoder_loads_from_files_with_the_former_prefix(tmp_path: Path) -> None:
    drawn = draw_network(find_part("image_encoder", TINY_BASE), 1, torch.float32)
    drawn.save_pretrained(tmp_path / "image_encoder")
    file = tmp_path / "image_encoder" / "model.safetensors"
    prefixed = {f"vision_model.{name}": value for name, value in drawn.state_dict().items()}
    save_file(prefixed, file, metadata={"format": "pt"})
    part = find_part("image_encoder", tmp_path)
    loaded = load_network(part, torch.float32, CPU).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in drawn.state_dict().items())


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    drawn = draw_network(find_part("image_encoder", TINY_BASE), 1, torch.float32)
    drawn.save_pretrained(tmp_path / "image_encoder")
    file = tmp_path / "image_encoder" / "model.safetensors"
    rest = {k: v for k, v in load_file(file).items() if not k.endswith("fc1.bias")}
    save_file(rest, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"missing tensors \(3\): encoder\.layers\.0\.mlp\.fc1\.bias"
    ):
        load_network(find_part("image_encoder", tmp_path), torch.float32, CPU)
