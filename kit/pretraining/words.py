"""The text and image encoders of a small base."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPVisionModel, UMT5EncoderModel

from kit.data.clips import RawSample
from kit.data.encode import to_video
from kit.draws import seed_of
from kit.models.encoders import ImageEncoder, TextEncoder
from kit.pretraining.base import EncoderTask, save_part
from kit.recipe import ExistingFolder

MAX_LENGTH = 512


class WordFeatures(EncoderTask):
    """Trains umT5 to keep which words stand together, and CLIP to see what a caption says.

    The text encoder must tell each token's left and right neighbour from the token's own state:
    so "blue" of blue hair differs from "blue" of a blue background. The image encoder must tell
    the caption's tokens from the picture.

    Args:
        seed: of the first weights.
        config: base folder with text_encoder/, image_encoder/ and tokenizer/.
    """

    def __init__(self, seed: int, *, config: ExistingFolder) -> None:
        folder = Path(config)
        self._configs: dict[str, dict[str, Any]] = {
            part: json.loads((folder / part / "config.json").read_text())
            for part in ("text_encoder", "image_encoder")
        }
        torch.manual_seed(seed_of(seed, "weights"))
        self._umt5 = UMT5EncoderModel(AutoConfig.from_pretrained(folder / "text_encoder"))
        self._clip = CLIPVisionModel(AutoConfig.from_pretrained(folder / "image_encoder"))
        self._tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._text = TextEncoder(self._umt5, self._tokenizer, MAX_LENGTH)
        self._image = ImageEncoder(self._clip)
        vocabulary = self._umt5.config.vocab_size
        self._neighbours = nn.Linear(self._umt5.config.d_model, 2 * vocabulary)
        self._seen = nn.Linear(self._clip.config.hidden_size, vocabulary)
        self._network = nn.ModuleDict(
            {
                "umt5": self._umt5,
                "clip": self._clip,
                "neighbours": self._neighbours,
                "seen": self._seen,
            }
        )

    @property
    def network(self) -> nn.Module:
        """Both encoders and the layers that read words from them."""
        return self._network

    def losses(self, batch: list[RawSample]) -> dict[str, Tensor]:
        """Ask the text for neighbours and the picture for words."""
        tokens = [self._tokens(raw.caption) for raw in batch]
        read = [self._read_neighbours(sentence) for sentence in tokens if len(sentence) > 2]
        seen = [self._see_words(raw, sentence) for raw, sentence in zip(batch, tokens, strict=True)]
        zero = self._neighbours.weight.sum() * 0
        return {
            "neighbours": torch.stack(read).mean() if read else zero,
            "words": torch.stack(seen).mean(),
        }

    def finish(self, batches: list[list[RawSample]]) -> None:
        """Measure nothing."""

    def save(self, folder: Path) -> None:
        """Write `text_encoder/`, `image_encoder/` and `tokenizer/`."""
        networks = {"text_encoder": self._umt5, "image_encoder": self._clip}
        for part, network in networks.items():
            save_part(folder / part, self._configs[part], network, "model.safetensors")
        self._tokenizer.save_pretrained(folder / "tokenizer")

    def _tokens(self, caption: str) -> Tensor:
        tokens: Tensor = self._tokenizer(caption, return_tensors="pt")["input_ids"][0]
        return tokens.to(self._umt5.device)

    def _read_neighbours(self, tokens: Tensor) -> Tensor:
        states = self._text.encode_tokens(tokens)[1:-1]  # [L - 2, D]
        left, right = self._neighbours(states).chunk(2, dim=-1)
        return F.cross_entropy(left, tokens[:-2]) + F.cross_entropy(right, tokens[2:])

    def _see_words(self, raw: RawSample, tokens: Tensor) -> Tensor:
        picture = to_video(raw.reference[None])[:, 0].to(self._clip.device)
        state = self._image.encode(picture).float().mean(dim=0)  # [D]
        said = torch.zeros(self._seen.out_features, device=state.device)
        said[tokens] = 1
        return F.binary_cross_entropy_with_logits(self._seen(state), said)
