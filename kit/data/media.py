"""The one door to media files: pictures and sound in and out, whatever module they live in.

Pictures are uint8 RGB, [H, W, 3] or [T, H, W, 3]; speech is float32 at 16 kHz.
"""

from kit.data.container import MediaInfo as MediaInfo
from kit.data.container import probe as probe
from kit.data.sound import decode_wav as decode_wav
from kit.data.sound import encode_wav as encode_wav
from kit.data.sound import load_speech as load_speech
from kit.data.sound import normalize_loudness as normalize_loudness
from kit.data.video_reader import iter_frames as iter_frames
from kit.data.video_reader import load_image as load_image
from kit.data.video_reader import read_frames as read_frames
from kit.data.video_writer import VideoWriter as VideoWriter
from kit.data.video_writer import encode_clip as encode_clip
from kit.data.video_writer import join_videos as join_videos
