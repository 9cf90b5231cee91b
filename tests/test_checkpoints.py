"""Names of weights, and reading them strictly from the public layouts."""

import gc
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kit.errors import InputError
from kit.models.audio import AudioSizes
from kit.models.base import Denoiser
from kit.models.checkpoints import load_weights
from kit.models.keys import our_name, public_name
from kit.models.layouts import find_layout
from kit.models.tensor_files import read_header
from kit.models.wan import Wan
from kit.models.wan_base import WanBase, empty_denoiser
from tests.outside import reference

TINY_BASE = Path(__file__).parents[1] / "data" / "tiny_base"
CPU = torch.device("cpu")
PUBLIC_14B = {"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}


@pytest.fixture(scope="module")
def full_size() -> dict[str, Tensor]:
    """Shapes of the 14B network under public names."""
    with torch.device("meta"):
        model = Wan(PUBLIC_14B, audio=AudioSizes())
    return {public_name(name) or "": value for name, value in model.state_dict().items()}


@pytest.fixture
def drawn() -> dict[str, Tensor]:
    """A tiny denoiser's weights under our names, all float32."""
    base = WanBase(path=str(TINY_BASE), random_weights=5, dtype="float32")
    return dict(base.load_denoiser(CPU).state_dict())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base folder with configurations of the denoiser alone."""
    for name in ("transformer", "audio"):
        (tmp_path / name).mkdir()
        config = (TINY_BASE / name / "config.json").read_text()
        (tmp_path / name / "config.json").write_text(config)
    return tmp_path


def is_audio(name: str) -> bool:
    return "audio_" in name or "norm_x" in name


def write_diffusers(folder: Path, drawn: dict[str, Tensor], *, shards: int = 1) -> None:
    """Write the trunk as diffusers does, with an index if there are several files."""
    trunk = {k.removeprefix("transformer."): v for k, v in drawn.items() if not is_audio(k)}
    if shards == 1:
        save_file(trunk, folder / "transformer/diffusion_pytorch_model.safetensors")
        return
    weight_map = {key: f"part{i % shards}.safetensors" for i, key in enumerate(trunk)}
    for file in set(weight_map.values()):
        part = {key: trunk[key] for key in trunk if weight_map[key] == file}
        save_file(part, folder / "transformer" / file)
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def write_public(file: Path, drawn: dict[str, Tensor], *, prefix: str = "") -> Path:
    save_file({f"{prefix}{public_name(name)}": value for name, value in drawn.items()}, file)
    return file


def audio_only(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in drawn.items() if is_audio(name)}


def assert_equal(model: Denoiser, drawn: dict[str, Tensor]) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == drawn.keys()
    assert all(torch.equal(loaded[name], drawn[name]) for name in drawn)


def test_counts_at_full_size(full_size: dict[str, Tensor]) -> None:
    audio = [name for name in full_size if is_audio(name)]
    assert len(full_size) == 1633
    assert len(audio) == 330
    assert sum(value.numel() for value in full_size.values()) == 18_882_046_784
    assert sum(full_size[name].numel() for name in audio) == 2_487_168_000


def test_names_at_full_size_are_the_public_ones(full_size: dict[str, Tensor]) -> None:
    lines = reference("keys_infinitetalk_14b.txt").read_text().splitlines()
    public = {name: json.loads(shape) for name, shape in (line.split(" ", 1) for line in lines)}
    assert {name: list(value.shape) for name, value in full_size.items()} == public


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_names_come_back(drawn: dict[str, Tensor], prefix: str) -> None:
    for name in drawn:
        assert our_name(f"{prefix}{public_name(name)}") == name


@pytest.mark.parametrize(
    ("ours", "public"),
    [
        ("transformer.blocks.0.attn1.to_q.weight", "blocks.0.self_attn.q.weight"),
        ("transformer.blocks.12.attn2.add_k_proj", "blocks.12.cross_attn.k_img"),
        ("transformer.blocks.3.audio_cross_attn.proj", "blocks.3.audio_cross_attn.proj"),
        ("transformer.blocks.3.ffn", "blocks.3.ffn"),
        ("transformer.blocks.3", "blocks.3"),
        ("transformer.blocks.3.norm2.bias", "blocks.3.norm3.bias"),
        ("audio_proj.proj1_vf", "audio_proj.proj1_vf"),
    ],
)
def test_names_of_modules_translate(ours: str, public: str) -> None:
    assert public_name(ours) == public


@pytest.mark.parametrize("name", ["audio_projector.weight", "transformer.blocks.0.attn3", "x"])
def test_unknown_names_have_no_translation(name: str) -> None:
    assert public_name(name) is None
    assert our_name(name) is None


@pytest.mark.parametrize("shards", [1, 3])
def test_diffusers_folder_with_audio_file(
    folder: Path, drawn: dict[str, Tensor], shards: int
) -> None:
    write_diffusers(folder, drawn, shards=shards)
    audio = write_public(folder / "infinitetalk.safetensors", audio_only(drawn))
    base = WanBase(path=str(folder), audio_weights=str(audio), dtype="float32")
    assert_equal(base.load_denoiser(CPU), drawn)


def test_diffusers_own_saving_can_be_read(folder: Path, drawn: dict[str, Tensor]) -> None:
    model = WanBase(path=str(TINY_BASE), random_weights=5, dtype="float32").load_denoiser(CPU)
    assert isinstance(model, Wan)
    # Audio parts in the blocks are then stored under their names as well.
    model.transformer.save_pretrained(folder / "transformer", safe_serialization=True)
    audio = write_public(folder / "infinitetalk.safetensors", audio_only(drawn))
    base = WanBase(path=str(folder), audio_weights=str(audio), dtype="float32")
    assert_equal(base.load_denoiser(CPU), drawn)


def test_the_projector_may_be_called_as_kijais_nodes_do() -> None:
    assert our_name("multitalk_audio_proj.proj1.weight") == "audio_proj.proj1.weight"
    assert our_name("diffusion_model.multitalk_audio_proj.norm.bias") == "audio_proj.norm.bias"


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_one_file_with_everything(folder: Path, drawn: dict[str, Tensor], prefix: str) -> None:
    full = write_public(folder / "full.safetensors", drawn, prefix=prefix)
    base = WanBase(path=str(folder), audio_weights=str(full), dtype="float32")
    assert_equal(base.load_denoiser(CPU), drawn)


def test_bfloat16_spares_what_is_computed_in_float32(
    folder: Path, drawn: dict[str, Tensor]
) -> None:
    full = write_public(folder / "full.safetensors", drawn)
    model = WanBase(path=str(folder), audio_weights=str(full)).load_denoiser(CPU)
    float32 = {name for name, value in model.state_dict().items() if value.dtype == torch.float32}
    block = "transformer.blocks.0"
    assert f"{block}.scale_shift_table" in float32
    assert f"{block}.norm2.weight" in float32
    assert f"{block}.norm_x.weight" in float32
    assert f"{block}.attn1.norm_q.weight" not in float32
    assert model.state_dict()[f"{block}.attn1.to_q.weight"].dtype == torch.bfloat16
    assert all(torch.equal(model.state_dict()[name], drawn[name]) for name in float32)


def test_tensors_that_nothing_reads_are_skipped(folder: Path, drawn: dict[str, Tensor]) -> None:
    write_diffusers(folder, drawn)
    extra = {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)}
    save_file(extra, folder / "transformer" / "extra.safetensors")
    audio = write_public(folder / "infinitetalk.safetensors", audio_only(drawn))
    base = WanBase(path=str(folder), audio_weights=str(audio), dtype="float32")
    assert_equal(base.load_denoiser(CPU), drawn)


def test_every_tensor_that_does_not_fit_is_named(folder: Path, drawn: dict[str, Tensor]) -> None:
    missing = "transformer.blocks.1.attn1.to_q.weight"
    other_shape = "transformer.patch_embedding.weight"
    wrong = {name: value for name, value in drawn.items() if name != missing}
    wrong[other_shape] = wrong[other_shape][:, :16].contiguous()
    full = folder / "full.safetensors"
    save_file({public_name(name) or name: value for name, value in wrong.items()}, full)
    save_file({"blocks.0.face_attn.q.weight": torch.ones(2)}, folder / "transformer/x.safetensors")
    base = WanBase(path=str(folder), audio_weights=str(full))
    with pytest.raises(InputError) as caught:
        base.load_denoiser(CPU)
    lines = str(caught.value).splitlines()
    assert lines[1:] == [
        f"missing tensors (1): {missing}",
        "unknown tensors (1): blocks.0.face_attn.q.weight",
        f"differently shaped tensors (1): {other_shape} is [48, 16, 1, 2, 2], "
        "not [48, 36, 1, 2, 2]",
    ]


def test_long_lists_are_cut(folder: Path, drawn: dict[str, Tensor]) -> None:
    write_diffusers(folder, drawn)
    with pytest.raises(InputError, match=r"missing tensors \(26\): .* and 16 more"):
        WanBase(path=str(folder)).load_denoiser(CPU)


def test_loading_holds_one_tensor_twice(folder: Path, drawn: dict[str, Tensor]) -> None:
    """Counts tensors of the stored dtype, and files that are mapped, at each parameter."""
    write_diffusers(folder, drawn, shards=3)
    write_public(folder / "infinitetalk.safetensors", audio_only(drawn))
    layout = find_layout(folder, {"audio": folder / "infinitetalk.safetensors"})
    model = empty_denoiser(layout)
    held: list[int] = []
    mapped: list[int] = []

    def dtype(name: str) -> torch.dtype:
        if len(mapped) % 16 == 0:
            held.append(num_alive(torch.float32))
        mapped.append(Path("/proc/self/maps").read_text().count(str(folder)))
        return torch.bfloat16

    before = num_alive(torch.float32)
    load_weights(model, layout.denoiser_tensors, device=CPU, dtype=dtype)
    assert len(mapped) == len(drawn)
    assert max(held) - before <= 2
    assert not any(mapped)
    assert num_alive(torch.float32) == before


def num_alive(dtype: torch.dtype) -> int:
    """Count tensors with memory of their own."""
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter)]
    return sum(1 for tensor in tensors if tensor.dtype == dtype and not tensor.is_meta)


def test_files_larger_than_memory_can_be_opened(tmp_path: Path) -> None:
    """A mapping of this size would be refused."""
    size = 1 << 43
    header = json.dumps({"x": {"dtype": "F16", "shape": [size // 2], "data_offsets": [0, size]}})
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header.encode())
        try:
            stream.truncate(8 + len(header) + size)
        except OSError:
            pytest.skip("this file system holds no sparse file of 8 TB, larger than any memory")
    assert read_header(file).tensors["x"].shape == (size // 2,)


def test_weights_by_torch_save_are_streamed_too(folder: Path, drawn: dict[str, Tensor]) -> None:
    """Under `state_dict`, as in full denoisers; and in the format before torch 1.6."""
    public = {public_name(name): value for name, value in drawn.items()}
    for is_archive in (True, False):
        file = folder / "full.pth"
        content = {"state_dict": public, "epoch": 3}
        torch.save(content, file, _use_new_zipfile_serialization=is_archive)
        base = WanBase(path=str(folder), audio_weights=str(file), dtype="float32")
        assert_equal(base.load_denoiser(CPU), drawn)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.gguf", r"a\.gguf' is no file of weights; valid: \.safetensors, \.pth"),
        ("a.safetensors", r"a\.safetensors' cannot be read; is it cut or damaged\?"),
        ("a.pth", r"a\.pth' cannot be read; is it cut or damaged\?"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF, or something else")
    with pytest.raises(InputError, match=words):
        read_header(tmp_path / name)


def test_drawn_weights_depend_on_seed_and_name(drawn: dict[str, Tensor]) -> None:
    again = WanBase(path=str(TINY_BASE), random_weights=5, dtype="float32").load_denoiser(CPU)
    other = WanBase(path=str(TINY_BASE), random_weights=6, dtype="float32").load_denoiser(CPU)
    assert_equal(again, drawn)
    assert not any(torch.equal(value, drawn[name]) for name, value in other.state_dict().items())
    assert all(value.count_nonzero() == value.numel() for value in drawn.values())


def test_problems_name_missing_files(tmp_path: Path) -> None:
    assert WanBase(path=str(TINY_BASE), random_weights=1).problems() == []
    lines = WanBase(path=str(TINY_BASE)).problems()
    titles = ("video autoencoder", "text encoder", "image encoder", "speech encoder", "transformer")
    expected = [f"base.path: no {title}: get " for title in titles]
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=False))
    assert "single/infinitetalk.safetensors of MeiGen-AI/InfiniteTalk" in lines[5]
    absent = tmp_path / "nowhere"
    base = WanBase(path=str(absent), audio_weights=str(absent / "a.safetensors"))
    assert base.problems() == [
        f"base.path: there is no folder '{absent}'",
        f"base.audio_weights: there is no file '{absent / 'a.safetensors'}'",
    ]
    with pytest.raises(InputError, match=r"base\.path: there is no folder"):
        base.load_denoiser(CPU)


def test_fingerprints_differ_by_seed_and_configuration(tmp_path: Path) -> None:
    base = WanBase(path=str(TINY_BASE), random_weights=1)
    assert base.fingerprint() == WanBase(path=str(TINY_BASE), random_weights=1).fingerprint()
    assert base.fingerprint() != WanBase(path=str(TINY_BASE), random_weights=2).fingerprint()
    (tmp_path / "config.json").write_text("{}")
    other = WanBase(path=str(TINY_BASE), random_weights=1, audio_encoder=str(tmp_path))
    assert base.fingerprint() != other.fingerprint()
