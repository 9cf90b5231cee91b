"""What a shard's sample holds, member by member; `data/README.md` tells the same to people."""

from typing import Literal

# pydantic checks the index, and needs this one before Python 3.12.
from typing_extensions import TypedDict

INDEX_NAME = "index.json"
ENCODED_FOLDER = "encoded"
"""Where encoded shards lie, inside the folder of the raw ones."""

INDEX_FORMAT = "charakit-shards"
INDEX_VERSION = 1

Settings = dict[str, str | int | float | None]
"""What encoded features depend on, by name."""

ShardKind = Literal["raw", "encoded"]
MediaKind = Literal["video", "image"]


class Meta(TypedDict):
    """The `json` member of a sample, repeated in the index.

    Attributes:
        kind: `video` or `image`.
        num_frames: video frames, 4n + 1; 1 for an image.
        height: rows of the stored pictures.
        width: columns of the stored pictures.
        fps: frames per second of the stored video.
        num_speakers: channels of the `wav` member; 0 for an image.
        num_masks: how many `speaker{i}.png` members there are.
        has_caption: False where `txt` is empty because no caption was given.
        source: file name without its folder.
        start_seconds: where the clip begins in its source.
        loudness: loudness of each track before it was brought to -23 LUFS; None where silent.
    """

    kind: MediaKind
    num_frames: int
    height: int
    width: int
    fps: int
    num_speakers: int
    num_masks: int
    has_caption: bool
    source: str
    start_seconds: float
    loudness: list[float | None]


class IndexedSample(TypedDict):
    """One sample in the index: where each member's bytes lie in the tar.

    Attributes:
        key: name of the sample.
        meta: the `json` member.
        members: extension to (offset, size) in bytes.
    """

    key: str
    meta: Meta
    members: dict[str, tuple[int, int]]


class IndexedShard(TypedDict):
    """One tar file in the index: its name, its size in bytes and its samples."""

    file: str
    bytes: int
    samples: list[IndexedSample]


class Index(TypedDict):
    """`index.json`, beside the shards.

    Attributes:
        format: always `charakit-shards`.
        version: of this layout.
        kind: `raw` or `encoded`.
        settings: what an encoded folder was encoded with; empty for raw.
        shards: the tar files in order.
    """

    format: str
    version: int
    kind: ShardKind
    settings: Settings
    shards: list[IndexedShard]
