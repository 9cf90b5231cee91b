"""A folder for the Hugging Face hub: a model card beside the files, and previews with sound."""

import re
import shutil
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from kit.adapters.files import AdapterInfo
from kit.adapters.metadata import recipe_of
from kit.atomic import atomic_write, write_text

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+(@.+)?")
LICENCES = {"wan": "apache-2.0"}
"""Of the public weights of each base: Wan2.1's and InfiniteTalk's."""

MAX_PREVIEWS = 4


def write_card(
    info: AdapterInfo, out: Path, files: Sequence[Path], trigger: str, previews: Sequence[Path]
) -> list[Path]:
    """Write `README.md`, and copy the latest previews beside it.

    Args:
        info: of the adapter.
        out: the folder to publish.
        files: in it.
        trigger: word in captions that calls for what was learnt; may be empty.
        previews: videos of the run, oldest first.

    Returns:
        All that was written. No paths and no user names are in it.
    """
    recipe = recipe_of(info)
    out.mkdir(parents=True, exist_ok=True)
    shown = [out / "previews" / path.name for path in previews[-MAX_PREVIEWS:]]
    for source, copy in zip(previews[-MAX_PREVIEWS:], shown, strict=True):
        copy.parent.mkdir(exist_ok=True)
        with atomic_write(copy) as partial:
            shutil.copyfile(source, partial)
    card = out / "README.md"
    matter = StringIO()
    YAML(typ="safe", pure=True).dump(_front_matter(info, recipe, files, trigger, shown), matter)
    text = f"---\n{matter.getvalue()}---\n{_text(info, recipe, files, trigger)}"
    write_text(card, text)
    return [card, *shown]


def _front_matter(
    info: AdapterInfo,
    recipe: Mapping[str, Any],
    files: Sequence[Path],
    trigger: str,
    previews: Sequence[Path],
) -> dict[str, Any]:
    caption = recipe.get("preview", {}).get("text", trigger)
    path = str(recipe["base"].get("path", ""))
    is_for_diffusers = any("pytorch_lora" in file.name for file in files)
    public = {"base_model": path.split("@")[0], "base_model_relation": "adapter"}
    return {
        "license": LICENCES.get(info.base, "other"),
        **(public if HUB_NAME.fullmatch(path) else {}),
        **({"library_name": "diffusers"} if is_for_diffusers else {}),
        "pipeline_tag": "image-to-video",
        "tags": [
            *(["lora", "template:diffusion-lora"] if is_for_diffusers else []),
            "talking-character",
            "infinitetalk",
        ],
        **({"instance_prompt": trigger} if trigger else {}),
        "widget": [
            {"text": caption or info.name, "output": {"url": f"previews/{preview.name}"}}
            for preview in previews
        ],
    }


def _text(info: AdapterInfo, recipe: Mapping[str, Any], files: Sequence[Path], trigger: str) -> str:
    listed = "\n".join(f"| `{file.name}` | {_reader(file)} |" for file in files)
    how = f"Write `{trigger}` into the caption." if trigger else ""
    steps = f"{info.steps} steps" if info.steps else "weights of a full fine-tuning"
    optimizer = recipe.get("optimizer", {})
    rate = f", learning rate {optimizer['lr']}" if "lr" in optimizer else ""
    return f"""
# {info.name}

An adapter ({info.kind}) for talking characters on Wan2.1 with InfiniteTalk's audio modules. {how}

| file | for |
|---|---|
{listed}

Trained with charakit: {steps}{rate}, parts {", ".join((*info.parts, *info.train_fully))}. The
licence of the base holds for what is made with it.
"""


def _reader(file: Path) -> str:
    readers = {
        "_comfyui": "ComfyUI (LoraLoader) and programs that read Wan's own names",
        "_infinitetalk": "audio modules with the adapter in them, in place of InfiniteTalk's file",
        "_kohya": "musubi-tuner",
    }
    found = (text for mark, text in readers.items() if file.stem.endswith(mark))
    return next(found, "diffusers: `pipe.load_lora_weights`")
