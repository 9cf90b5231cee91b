"""Make the studio base's tokenizer from the captions of its training shards.

Run: python data/make_tokenizer.py runs/studio/shards/train data/studio_base/tokenizer
"""

import argparse
import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from kit.data.clips import read_caption
from kit.data.shards import Shards

VOCABULARY = 512
SPECIAL = ["<pad>", "</s>", "<unk>"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'-"


def main() -> None:
    """Read the captions and write `tokenizer.json` and its configuration."""
    parser = argparse.ArgumentParser(description="Make the studio base's tokenizer.")
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    shards = Shards(options.shards)
    captions = [read_caption(shards, number) for number in range(len(shards))]
    options.out.mkdir(parents=True, exist_ok=True)
    make_tokenizer(captions).save(str(options.out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "unk_token": SPECIAL[2],
    }
    (options.out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_tokenizer(captions: list[str]) -> Tokenizer:
    """Learn the words of the captions; other words fall into letters."""
    tokenizer = Tokenizer(BPE(unk_token=SPECIAL[2]))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=list(LETTERS),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    # As umT5 does, a text ends with its end token.
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


if __name__ == "__main__":
    main()
