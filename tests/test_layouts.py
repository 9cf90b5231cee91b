"""Bases as people have them: diffusers' layout, Wan2.1's own, and single files of ComfyUI."""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from kit.cli import main
from kit.errors import InputError
from kit.models import sizes
from kit.models.audio import AudioSizes
from kit.models.encoder_keys import video_names
from kit.models.encoders import (
    ImageEncoder,
    SpeechEncoder,
    TextEncoder,
    VideoEncoder,
    load_network,
)
from kit.models.inspection import survey_file, survey_folder
from kit.models.keys import is_audio, public_name
from kit.models.layouts import ENCODERS, find_part
from kit.models.wan import Wan
from kit.models.wan_base import WanBase
from tests.originals import (
    ORIGINAL_FILES,
    State,
    copy_tokenizer,
    draw_states,
    original_video,
    public_denoiser,
    write_denoiser,
    write_original,
    write_tiny_configs,
)
from tests.outside import reference

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
CPU = torch.device("cpu")
SEED = 5
PUBLIC_14B = {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}


@pytest.fixture(scope="module")
def drawn() -> dict[str, State]:
    """A tiny base's weights in float32: the denoiser, and encoders by the names of their parts."""
    return draw_states(SEED)


@pytest.fixture(scope="module")
def original(drawn: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base in Wan2.1's own layout, with InfiniteTalk's file and a speech encoder."""
    folder = tmp_path_factory.mktemp("original")
    return write_original(folder, drawn)


def assert_equal(state: Mapping[str, Tensor], expected: State) -> None:
    assert state.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(state[name], expected[name])]
    assert not different, different[:5]


def load_encoder(base: WanBase, name: str) -> Mapping[str, Tensor]:
    layout = base._find((), with_speech=True)
    state: Mapping[str, Tensor] = load_network(layout.parts[name], torch.float32, CPU).state_dict()
    return state


def original_base(folder: Path, **options: Any) -> WanBase:
    audio = str(folder / "infinitetalk.safetensors")
    return WanBase(path=str(folder), audio_weights=audio, dtype="float32", **options)


def test_the_original_layout_gives_the_same_denoiser(
    original: Path, drawn: dict[str, State]
) -> None:
    base = original_base(original)
    assert base.problems() == []
    assert_equal(base.load_denoiser(CPU).state_dict(), drawn["denoiser"])


@pytest.mark.parametrize("name", ENCODERS)
def test_the_original_layout_gives_the_same_encoders(
    original: Path, drawn: dict[str, State], name: str
) -> None:
    assert_equal(load_encoder(original_base(original), name), drawn[name])


def test_encoders_of_the_original_layout_compute(original: Path) -> None:
    encoders = original_base(original).load_encoders(CPU)
    drawn = WanBase(path=str(TINY_BASE), random_weights=SEED, dtype="float32").load_encoders(CPU)
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 1, 32, 32)
    assert torch.equal(encoders.encode_video(pixels), drawn.encode_video(pixels))
    assert torch.equal(encoders.encode_image(pixels[:, :, 0]), drawn.encode_image(pixels[:, :, 0]))
    assert torch.equal(encoders.encode_text(["A cat."])[0], drawn.encode_text(["A cat."])[0])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_single_files_for_every_part(tmp_path: Path, drawn: dict[str, State], prefix: str) -> None:
    """As in ComfyUI: `path` holds only the tokenizer, and what shapes do not tell."""
    copy_tokenizer(tmp_path / "tokenizer")
    write_tiny_configs(tmp_path)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text('{"attention_head_dim": 24}')
    public = {f"{prefix}{key}": v for key, v in public_denoiser(drawn["denoiser"]).items()}
    options: dict[str, Any] = {"transformer": str(tmp_path / "wan.safetensors")}
    save_file(public, options["transformer"])
    contents = {
        "vae": original_video(drawn["vae"]),
        "text_encoder": {k: v for k, v in drawn["text_encoder"].items() if "embed_tokens" not in k}
        | {"spiece_model": torch.zeros(8, dtype=torch.uint8)},
        "image_encoder": {f"vision_model.{k}": v for k, v in drawn["image_encoder"].items()}
        | {"visual_projection.weight": torch.ones(8, 32)},
        "audio_encoder": drawn["audio_encoder"],
    }
    for name, content in contents.items():
        options[name] = str(tmp_path / f"{name}.safetensors")
        save_file(content, options[name])
    config = json.loads((TINY_BASE / "audio_encoder" / "config.json").read_text())
    (tmp_path / "audio_encoder").mkdir()
    heads = {"num_attention_heads": config["num_attention_heads"]}
    (tmp_path / "audio_encoder/config.json").write_text(json.dumps(heads))
    base = WanBase(path=str(tmp_path), dtype="float32", **options)
    assert base.problems() == []
    assert_equal(base.load_denoiser(CPU).state_dict(), drawn["denoiser"])
    for name in ENCODERS:
        assert_equal(load_encoder(base, name), drawn[name])


def test_a_file_wins_over_the_folder(
    original: Path, tmp_path: Path, drawn: dict[str, State]
) -> None:
    other = tmp_path / "vae.safetensors"
    save_file({name: 2 * value for name, value in drawn["vae"].items()}, other)
    base = original_base(original, vae=str(other))
    expected = {name: 2 * value for name, value in drawn["vae"].items()}
    assert_equal(load_encoder(base, "vae"), expected)
    assert base.fingerprint() != original_base(original).fingerprint()


def load_reference(name: str) -> tuple[State, dict[str, Any]]:
    """Read all tensors and facts of a file of reference outputs."""
    path = reference(f"{name}.safetensors")
    with safe_open(path, "pt") as reader:
        return load_file(path), json.loads(reader.metadata()["meta"])


def reference_weights(tensors: State) -> State:
    return {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}


def test_the_reference_denoiser_loads_from_its_own_layout(tmp_path: Path) -> None:
    tensors, facts = load_reference("dit_single")
    weights = reference_weights(tensors)
    write_denoiser(tmp_path, weights, num_shards=7)
    config = {name: value for name, value in facts["config"].items() if name != "text_dim"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = original_base(tmp_path).load_denoiser(CPU).state_dict()
    assert_equal(public_denoiser(dict(loaded)), weights)


@torch.no_grad()
def test_reference_encoders_load_from_the_original_layout(tmp_path: Path) -> None:
    found = {name: load_reference(name) for name in ("vae", "t5", "clip", "wav2vec")}
    files = dict(zip(("vae", "t5", "clip"), ORIGINAL_FILES.values(), strict=True))
    for name, file in files.items():
        torch.save(reference_weights(found[name][0]), tmp_path / file)
    (tmp_path / "image_encoder").mkdir()
    (tmp_path / "image_encoder/config.json").write_text('{"num_attention_heads": 4}')
    (tmp_path / "audio_encoder").mkdir()
    (tmp_path / "audio_encoder/config.json").write_text('{"num_attention_heads": 4}')
    save_file(reference_weights(found["wav2vec"][0]), tmp_path / "audio_encoder/a.safetensors")
    networks: dict[str, Any] = {
        name: load_network(find_part(name, tmp_path), torch.float32, CPU).eval()
        for name in ENCODERS
    }
    video, text, image, speech = (found[name][0] for name in ("vae", "t5", "clip", "wav2vec"))
    latents = VideoEncoder(networks["vae"]).encode(video["inputs/video"][0])
    assert (latents - video["outputs/latent"]).abs().max() < 1e-4
    length = int(text["inputs/mask"][0].sum())
    encoder = TextEncoder(networks["text_encoder"], None, 512)  # type: ignore[arg-type]
    states = encoder.encode_tokens(text["inputs/ids"][0, :length])
    assert (states - text["outputs/hidden"][0, :length]).abs().max() < 1e-4
    features = ImageEncoder(networks["image_encoder"]).encode(image["inputs/video"][0, :, 0])
    assert (features - image["outputs/features"][0]).abs().max() < 1e-5
    heard = SpeechEncoder(networks["audio_encoder"], fps=25).encode(speech["inputs/waveform"])
    assert (heard - speech["outputs/embedding"]).abs().max() < 1e-4


def test_the_video_autoencoder_is_named_as_diffusers_converts_it() -> None:
    with init_empty_weights(include_buffers=False):
        ours = dict(AutoencoderKLWan().state_dict())
    theirs = original_video(ours)
    converted = convert_wan_vae_to_diffusers({key: key for key in theirs})  # type: ignore[no-untyped-call]
    assert converted.keys() == ours.keys()
    assert {names[0]: key for key, names in video_names(list(theirs)).items()} == converted


PUBLIC_SIZES: dict[str, tuple[sizes.Sizes, Callable[[], nn.Module], dict[str, Any]]] = {
    "text": (
        sizes.TEXT,
        lambda: UMT5EncoderModel(
            UMT5Config(
                vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
            )
        ),
        {"d_kv": 64, "num_heads": 64, "num_layers": 24, "d_ff": 10240, "vocab_size": 256384,
         "relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu"},
    ),
    "image": (
        sizes.IMAGE,
        lambda: CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, patch_size=14,
                num_attention_heads=16, image_size=224,
            )
        ),
        {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "patch_size": 14,
         "num_attention_heads": 16, "image_size": 224, "num_channels": 3, "hidden_act": "gelu"},
    ),
    "video": (
        sizes.VIDEO,
        AutoencoderKLWan,
        {"base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
         "temperal_downsample": [False, True, True]},
    ),
    "speech": (
        sizes.SPEECH,
        lambda: Wav2Vec2Model(Wav2Vec2Config()),
        {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072,
         "num_attention_heads": 12, "conv_dim": [512] * 7, "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
         "conv_bias": False, "num_conv_pos_embeddings": 128, "num_conv_pos_embedding_groups": 16},
    ),
    "transformer": (
        sizes.TRANSFORMER,
        lambda: Wan(PUBLIC_14B, audio=AudioSizes()),
        {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824,
         "in_channels": 36, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
         "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "audio": (
        sizes.AUDIO,
        lambda: Wan(PUBLIC_14B, audio=AudioSizes()),
        {"num_layers": 12, "audio_dim": 768, "intermediate_dim": 512, "output_dim": 768,
         "context_tokens": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC_SIZES)
def test_public_sizes_follow_from_public_shapes(name: str) -> None:
    rules, build, expected = PUBLIC_SIZES[name]
    with init_empty_weights(include_buffers=False):
        shapes = {key: tuple(value.shape) for key, value in build().state_dict().items()}
    config = sizes.complete_config(rules, {}, shapes, "here")
    assert {entry: config[entry] for entry in expected} == expected


def test_what_shapes_do_not_tell_is_asked_for() -> None:
    shapes = {
        "embeddings.class_embedding": (64,),
        "embeddings.patch_embedding.weight": (64, 3, 8, 8),
    }
    with pytest.raises(InputError, match=r"a\.pth: cannot tell image_size: there is no fitting"):
        sizes.complete_config(sizes.IMAGE, {}, shapes, "a.pth")
    whole = shapes | {
        "embeddings.position_embedding.weight": (17, 64),
        "encoder.layers.0.mlp.fc1.weight": (9, 64),
    }
    with pytest.raises(InputError, match=r"num_attention_heads: 64 is no multiple of 80, which"):
        sizes.complete_config(sizes.IMAGE, {}, whole, "a.pth")
    config = sizes.complete_config(sizes.IMAGE, {"num_attention_heads": 4}, whole, "a.pth")
    assert (config["num_attention_heads"], config["image_size"]) == (4, 32)


def write_header(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """Write a safetensors file whose numbers are a hole: a header of any size, and no memory."""
    entries, offset = {}, 0
    for key, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        stream.truncate(8 + len(header) + offset)


@pytest.fixture(scope="module")
def full_size() -> dict[str, tuple[int, ...]]:
    """Shapes of the 14B denoiser by our names."""
    with torch.device("meta"):
        model = Wan(PUBLIC_14B, audio=AudioSizes())
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_the_public_files_fit_at_full_size(
    tmp_path: Path, full_size: dict[str, tuple[int, ...]]
) -> None:
    """Wan2.1's seven shards and InfiniteTalk's file: 18.9 billion parameters, headers only."""
    public = {public_name(name) or name: shape for name, shape in full_size.items()}
    trunk = [key for key in public if not is_audio(key)]
    weight_map = {
        key: f"diffusion_pytorch_model-{i % 7}.safetensors" for i, key in enumerate(trunk)
    }
    for file in set(weight_map.values()):
        write_header(tmp_path / file, {k: public[k] for k in trunk if weight_map[k] == file})
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "i2v", "dim": 5120, "num_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps({**config, "in_dim": 36, "freq_dim": 256}))
    audio = {key: shape for key, shape in public.items() if is_audio(key)}
    write_header(tmp_path / "infinitetalk.safetensors", audio)
    survey = survey_folder(tmp_path)
    assert survey.heading == "a base in Wan2.1's own layout"
    assert "1,303 tensors, 16,394,878,784 parameters, bfloat16" in survey.lines[0]
    assert "32.8 GB in 7 files" in survey.lines[0]
    assert survey.problems == ()
    survey = survey_file(tmp_path / "infinitetalk.safetensors")
    assert survey.heading == "audio parts"
    assert "330 tensors, 2,487,168,000 parameters" in survey.lines[0]
    base = WanBase(path=str(tmp_path), audio_weights=str(tmp_path / "infinitetalk.safetensors"))
    assert not any("tensors (" in line for line in base.problems())
    assert len(list(base.empty_denoiser().parameters())) == 1633


def test_the_diffusers_layout_fits_at_full_size(
    tmp_path: Path, full_size: dict[str, tuple[int, ...]]
) -> None:
    names = {name.removeprefix("transformer."): shape for name, shape in full_size.items()}
    trunk = {name: shape for name, shape in names.items() if not is_audio(name)}
    (tmp_path / "transformer").mkdir()
    write_header(tmp_path / "transformer/diffusion_pytorch_model.safetensors", trunk)
    survey = survey_folder(tmp_path)
    assert survey.heading == "a base in diffusers' layout"
    assert "1,303 tensors, 16,394,878,784 parameters" in survey.lines[0]
    assert survey.problems == ()


def test_check_says_what_a_folder_is_and_what_is_missing(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(original)]) == 0
    said = capsys.readouterr().out
    assert "a base in Wan2.1's own layout and diffusers' layout" in said
    assert "text encoder: 22 tensors, " in said and "transformer: 87 tensors, " in said
    assert "no text encoder" not in said and "no tokenizer" not in said
    assert "  infinitetalk.safetensors: audio parts" in said
    assert "get single/infinitetalk.safetensors of MeiGen-AI/InfiniteTalk" in said
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder/config.json").write_text('{"num_heads": 64}')
    assert main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    files = [
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl",
        "index of Wan-AI",
    ]
    assert all(file in said for file in files)


def test_check_knows_single_files(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [original / "infinitetalk.safetensors", original / ORIGINAL_FILES["text_encoder"]]
    assert main(["check", *map(str, files)]) == 0
    said = capsys.readouterr().out
    assert "infinitetalk.safetensors: audio parts\n  audio parts: 26 tensors" in said
    assert f"{files[1]}: text encoder\n" in said


def test_check_lists_files_in_no_layout(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("infinitetalk.safetensors", ORIGINAL_FILES["text_encoder"]):
        (tmp_path / f"my_{name}").write_bytes((original / name).read_bytes())
    save_file({"x": torch.ones(1)}, tmp_path / "z.safetensors")
    assert main(["check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "3 files of weights, in no layout" in said
    assert "my_infinitetalk.safetensors: audio parts" in said
    assert "z.safetensors: tensors of no network that a base has" in said


def test_check_names_what_is_wrong_with_files(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in original.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "diffusion_pytorch_model-00003-of-00007.safetensors").unlink()
    vae = tmp_path / "Wan2.1_VAE.pth"
    vae.write_bytes(vae.read_bytes()[:-100])
    assert main(["check", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "there is no" in said and "model-00003-of-00007" in said
    assert "Wan2.1_VAE.pth' cannot be read; is it cut or damaged?" in said


def test_a_file_in_the_wrong_place_is_told(original: Path) -> None:
    text = str(original / ORIGINAL_FILES["text_encoder"])
    (line,) = original_base(original, vae=text).problems()
    assert line.startswith("base.vae: ")
    assert line.endswith("should hold the video autoencoder, but holds: text encoder")
    (line,) = original_base(original, image_encoder=str(original / "gone.pth")).problems()
    assert line == f"base.image_encoder: there is no file '{original / 'gone.pth'}'"


def test_the_text_to_video_model_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "t2v", "dim": 5120, "num_heads": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (line,) = WanBase(path=str(tmp_path)).problems()
    assert "model_type is 't2v'; valid: i2v" in line


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    torch.save({"conv1.weight": Path("a")}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(InputError, match="cannot be read"):
        load_network(find_part("vae", tmp_path), torch.float32, CPU)
