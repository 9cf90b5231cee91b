"""Sizes are the source's own, and pictures are brought to them as the source does it."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from kit.data.buckets import TABLES, fit, fit_mask, nearest_bucket, parse_buckets
from kit.errors import InputError
from tests.outside import reference as reference_file


@pytest.fixture
def reference() -> dict[str, Tensor]:
    with safe_open(reference_file("utils.safetensors"), "pt") as file:
        assert json.loads(file.metadata()["meta"])["kind"] == "utils"
        return {name: file.get_tensor(name) for name in file.keys()}


@pytest.mark.parametrize(("table", "name"), [("480", "627"), ("720", "960")])
def test_tables_are_the_reference(reference: dict[str, Tensor], table: str, name: str) -> None:
    rows = [(label, *size) for label, size in TABLES[table].items()]
    expected = reference[f"outputs/buckets.ASPECT_RATIO_{name}"]
    assert torch.equal(torch.tensor(rows, dtype=torch.float64), expected)


def test_fit_is_the_reference(reference: dict[str, Tensor]) -> None:
    expected = reference["outputs/resize.image"][0, :, 0].permute(1, 2, 0)  # [H, W, 3]
    assert np.array_equal(fit(reference["inputs/resize.image"].numpy(), 64, 96), expected)
    masks = (reference["inputs/resize.masks"] * 255).to(torch.uint8).numpy()
    fitted = np.stack([fit_mask(mask, 64, 96) for mask in masks])
    assert np.array_equal(fitted / 255, reference["outputs/resize.masks"])


@pytest.mark.parametrize("table", TABLES)
def test_sizes_are_multiples_of_16(table: str) -> None:
    assert all(h % 16 == 0 and w % 16 == 0 for h, w in TABLES[table].values())


@pytest.mark.parametrize(
    ("height", "width", "chosen"),
    [
        (1080, 1920, (448, 896)),
        (1920, 1080, (832, 448)),
        (458, 458, (640, 640)),
        (9, 1, (1280, 320)),
    ],
)
def test_nearest_by_label(height: int, width: int, chosen: tuple[int, int]) -> None:
    assert nearest_bucket(height, width, parse_buckets("480")) == chosen


def test_custom_sizes() -> None:
    buckets = parse_buckets(["64x64", "48x80"])
    assert buckets == {1.0: (64, 64), 0.6: (48, 80)}
    assert parse_buckets("64x64,48x80") == buckets
    assert nearest_bucket(90, 160, buckets) == (48, 80)


@pytest.mark.parametrize("spec", ["640", "64*64", ["64x60"], ["0x64"], ["axb"], ["64x64x9"], []])
def test_unfit_sizes_are_named(spec: str | list[str]) -> None:
    with pytest.raises(InputError, match="^buckets: "):
        parse_buckets(spec)


def test_fit_cuts_out_the_middle() -> None:
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 24:40] = 255
    fitted = fit(image, 32, 16)
    assert fitted.shape == (32, 16, 3)
    assert (fitted == 255).all()


def test_masks_keep_to_two_values() -> None:
    mask = np.zeros((37, 53), np.uint8)
    mask[10:20, 5:40] = 255
    fitted = fit_mask(mask, 64, 48)
    assert fitted.shape == (64, 48)
    assert set(np.unique(fitted)) == {0, 255}
