"""`kit extract`: what a training changed, as an adapter, is what was trained."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.adapters.files import load_adapter
from kit.adapters.lora import apply_adapter
from kit.batch import Batch
from kit.cli import main
from kit.draws import draw_normal
from kit.models.keys import public_name
from kit.models.wan_base import WanBase
from tests.originals import draw_states, write_original

CPU = torch.device("cpu")
LAYERS = {
    "transformer.blocks.0.attn1.to_q": "diffusion_pytorch_model",
    "transformer.blocks.1.ffn.net.2": "diffusion_pytorch_model",
    "transformer.blocks.1.audio_cross_attn.proj": "infinitetalk",
}
Extract = Callable[..., int]


@pytest.fixture
def extract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extract:
    """Two bases in a folder, the second with changes of rank 3, and the command on them."""
    monkeypatch.chdir(tmp_path)
    Path("wan").mkdir()
    write_original(Path("wan"), draw_states(8))
    for file in Path("wan").glob("*.pth"):
        file.unlink()  # encoders have no part in this
    shutil.copytree("wan", "tuned")
    for file in Path("tuned").glob("*.safetensors"):
        tensors = load_file(file)
        for layer in LAYERS:
            key = f"{public_name(layer)}.weight"
            if key in tensors:
                rows, columns = tensors[key].shape
                up, down = draw_normal((rows, 3), layer, "up"), draw_normal((3, columns), layer)
                tensors[key] = tensors[key] + 0.1 * up @ down
        save_file(tensors, file)

    def run(*words: str) -> int:
        return main(["extract", "wan", "tuned", "--out", "ann.safetensors", *words])

    return run


def base(folder: str) -> WanBase:
    audio = f"{folder}/infinitetalk.safetensors"
    return WanBase(path=folder, audio_weights=audio, dtype="float32")


def test_what_changed_comes_back(
    extract: Extract, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract("--rank", "4") == 0
    said = capsys.readouterr().out
    assert "ann.safetensors: 3 layers, rank 4" in said
    assert "parameters changed that have no factors" not in said
    tensors, info = load_adapter(Path("ann.safetensors"))
    assert info.kind == "lora" and len(tensors) == 9
    adapted = base("wan").load_denoiser(CPU)
    apply_adapter(adapted, tensors, info.kind)
    sigma = torch.full((3,), 0.7)
    with torch.no_grad():
        expected = base("tuned").load_denoiser(CPU)(batch.latents, sigma, batch.conditions)
        found = adapted(batch.latents, sigma, batch.conditions)
        before = base("wan").load_denoiser(CPU)(batch.latents, sigma, batch.conditions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_what_has_no_place_in_factors_is_told(
    extract: Extract, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract("--rank", "1", "--parts", "attention,ffn") == 0
    said = capsys.readouterr().out
    assert "2 layers, rank 1" in said
    assert "of the change of transformer.blocks." in said
    assert (
        "1 parameters changed that have no factors, transformer.blocks.1.audio_cross_attn" in said
    )


def test_merging_what_was_extracted_gives_the_tuned_weights(extract: Extract) -> None:
    assert extract() == 0
    assert main(["export", "ann.safetensors", "--to", "wan", "--out", "out"]) == 0
    expected: dict[str, torch.Tensor] = {}
    for file in Path("tuned").glob("*.safetensors"):
        expected |= load_file(file)
    merged: dict[str, torch.Tensor] = {}
    for file in Path("out/wan").glob("*.safetensors"):
        merged |= load_file(file)
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "nose"], "unknown part 'nose'"),
        (["base.path=nowhere"], "there is no folder 'nowhere'"),
        (["--parts", ","], "--parts: name at least one part"),
    ],
)
def test_mistakes_are_told(
    extract: Extract, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert extract(*words) == 2
    assert message in capsys.readouterr().err
    assert not Path("ann.safetensors").exists()
    assert main(["extract", "wan", "wan", "--out", "ann.safetensors"]) == 2
    assert "no layer of attention, ffn, audio changed" in capsys.readouterr().err


def test_places_are_looked_at_before_the_work(
    extract: Extract, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    assert main(["extract", "wan", "tuned", "--out", "folder"]) == 2
    assert "--out: 'folder' is a folder; name a file" in capsys.readouterr().err
    assert main(["extract", "wan", "tuned", "--out", "new/place/ann.safetensors"]) == 0
    assert Path("new/place/ann.safetensors").exists()


def test_other_sizes_are_refused(extract: Extract, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(Path("tuned/config.json").read_text())
    Path("tuned/config.json").write_text(json.dumps({**facts, "num_layers": 1}))
    for file in Path("tuned").glob("*.safetensors"):
        tensors = {k: v for k, v in load_file(file).items() if "blocks.1." not in k}
        save_file(tensors, file)
    index = Path("tuned/diffusion_pytorch_model.safetensors.index.json")
    weights = json.loads(index.read_text())["weight_map"]
    kept = {k: v for k, v in weights.items() if "blocks.1." not in k}
    index.write_text(json.dumps({"weight_map": kept}))
    assert extract() == 2
    assert "differ in size: transformer.blocks.1." in capsys.readouterr().err
