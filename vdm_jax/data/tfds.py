"""A built data set of TensorFlow Datasets (TFDS) as an endless random-access source, without TensorFlow.

The data set must be stored as array_record: build it with `file_format="array_record"`. Its features must be Tensor,
Scalar, Text, ClassLabel or sequences of them. The features Video, Image and Audio need TensorFlow to be decoded.

A data set that `python -m vdm_jax.prepare` has made tells its rates in the file PREPARED.
"""

import dataclasses
import math

import numpy as np
from etils import epath

from vdm_jax.data import media
from vdm_jax.data.files import epoch_order
from vdm_jax.data.rates import sample_count
from vdm_jax.errors import UserError
from vdm_jax.run import storage
from vdm_jax.settings import setting

PREPARED = "prepared.json"


def _share_examples(a, b):
    """Returns whether two parts of splits, as TFDS gives them, have an example in common."""
    (a_start, a_end), (b_start, b_end) = ((x.from_ or 0, math.inf if x.to is None else x.to) for x in (a, b))
    return a.splitname == b.splitname and max(a_start, b_start) < min(a_end, b_end)


def package():
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError("TFDS needs two packages: pip install tensorflow-datasets array-record") from error
    return tensorflow_datasets


def open_builder(name, data_dir):
    """Returns the TFDS builder of a built data set. name, data_dir: see Tfds. TFDS has an error for each fault."""
    if epath.Path(name).is_dir():
        return package().builder_from_directory(name)
    return package().builder(name, data_dir=data_dir, try_gcs=False)


@dataclasses.dataclass(eq=False)
class Tfds:
    """Random windows of a data set's videos, without end. Item i follows from (seed, i).

    An item is {'video': uint8 [F, h, w, 3], 'audio': float32 [F * sample_rate // fps], 'caption': str}. Where a video
    is shorter than a window, its last frame is repeated. In each epoch every example comes once.

    The video is a feature uint8 [T, H, W, 3], or with 1 channel. The sound begins with the video: a feature of float in
    [-1, 1] or of int16, [N] or [N, channels]. The caption is a text, one of several texts, or a class label.

    Raises UserError if the data set cannot be read.
    """

    in_epochs = True  # see batches.Examples

    name: str  # of a data set in `data_dir`, or the folder of a built data set
    _: dataclasses.KW_ONLY
    frames: int  # F, of a window
    size: int | tuple[int, int]  # h = w, or (h, w), in pixels
    fps: float  # frames per second of a window
    sample_rate: int  # of the sound of a window, in Hz
    seed: int  # of the order of examples and of the windows
    part: str = "train"  # or "held_out"
    split: str = "train"  # of part "train", in the notation of TFDS
    held_out: str = ""  # of part "held_out"; "" for `split`: then nothing is held out from training
    data_dir: str | None = None  # folder of the built data sets; None is TFDS's default
    video_key: str = "video"
    audio_key: str = ""  # "" for silent clips
    caption_key: str = ""  # "" for the empty text
    source_fps: float = 0.0  # frames per second of the data set's videos; 0 is that of PREPARED, else `fps`
    source_sample_rate: int = 0  # of the data set's sound, in Hz; 0 is that of PREPARED, else `sample_rate`

    def __post_init__(self):
        tfds = package()
        if not self.name:
            raise UserError("data.tfds.name is empty: name a data set or its folder, --config.data.tfds.name=NAME")
        split = self.held_out if self.part == "held_out" and self.held_out else self.split
        try:
            builder = open_builder(self.name, self.data_dir)
            self.features = builder.info.features
            self.source = builder.as_data_source(split=split)
            self.count = len(self.source)
            train, held_out = (
                tfds.core.ReadInstruction.from_spec(s).to_absolute(builder.info.splits) if s else []
                for s in (self.split, self.held_out)
            )
        except Exception as error:  # each fault has an error of its own: unknown, not built, another format
            raise self._fault(f"split {split!r} cannot be opened", error) from error
        if any(_share_examples(a, b) for a in train for b in held_out):
            raise UserError(
                f"data.tfds.split={self.split!r} and data.tfds.held_out={self.held_out!r} share examples: give two "
                "parts such as 'train[:90%]' and 'train[90%:]', or two splits"
            )
        for key in (self.video_key, *filter(None, (self.audio_key, self.caption_key))):
            if key not in self.features:
                known = ", ".join(self.features)
                raise UserError(f"data set {self.name!r} has no feature {key!r}, only {known}: name one of them")
        if not self.count:
            raise UserError(f"data set {self.name!r}: split {split!r} is empty")
        told = {}
        if (path := epath.Path(builder.data_dir) / PREPARED).exists():
            told = storage.read_json(path, "prepare the data set again")
        for key in ("fps", "sample_rate"):
            allowed = setting(f"data.{key}").allowed
            if key in told and not allowed.fits(told[key]):
                raise UserError(f"{path}: {key}={told[key]!r} is not {allowed.words}: prepare the data set again")
        self.source_fps = self.source_fps or told.get("fps") or self.fps
        self.source_sample_rate = self.source_sample_rate or told.get("sample_rate") or self.sample_rate
        self.read(0)  # an example that cannot be decoded ends the run now, not after an hour

    def _fault(self, what: str, error: Exception) -> UserError:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return UserError(f"data set {self.name!r}: {what} ({reason})")

    def read(self, index: int):
        """Returns (video uint8 [T, H, W, C], audio or None, captions) of an example."""
        try:
            example = self.source[int(index)]
        except Exception as error:
            raise self._fault(f"example {index} cannot be decoded; its features may need TensorFlow", error) from error
        video = np.asarray(example[self.video_key])
        if video.ndim != 4 or video.dtype != np.uint8 or video.shape[-1] not in (1, 3) or not video.size:
            found = f"{video.dtype} {list(video.shape)}"
            raise UserError(f"data set {self.name!r}: {self.video_key!r} is {found}, not uint8 [T, H, W, 3]")
        audio = np.asarray(example[self.audio_key]) if self.audio_key else None
        if audio is not None and (audio.ndim not in (1, 2) or audio.dtype.kind not in "fi"):
            found = f"{audio.dtype} {list(audio.shape)}"
            raise UserError(f"data set {self.name!r}: {self.audio_key!r} is {found}, not float [N]")
        if not self.caption_key:
            return video, audio, [""]
        captions = np.asarray(example[self.caption_key]).ravel()
        if hasattr(self.features[self.caption_key], "int2str"):
            captions = [self.features[self.caption_key].int2str(int(c)) for c in captions]
        texts = [c.decode("utf-8", "replace") if isinstance(c, bytes) else str(c) for c in captions]
        return video, audio, texts or [""]

    def __len__(self) -> int:
        return 2**31 - 1

    def __getitem__(self, i: int) -> dict:
        epoch, place = divmod(i, self.count)
        where, which = np.random.default_rng([self.seed, i]).random(2)
        video, audio, captions = self.read(epoch_order(self.seed, epoch, self.count)[place])
        start = int(where * (max(0, self.frames_at_fps(video) - self.frames) + 1)) / self.fps  # s
        clip, sound = self.window(video, audio, start, self.frames)
        return {"video": clip, "audio": sound, "caption": captions[int(which * len(captions))]}

    def frames_at_fps(self, video) -> int:
        """Returns how many frames at `fps` a video has, of at least one."""
        return max(1, int(len(video) * self.fps / self.source_fps + 1e-6))

    def window(self, video, audio, start: float, frames: int):
        """Returns frames of an example with their sound: uint8 [frames, h, w, 3], float32 [N].

        video, audio: as `read` returns them
        start: in s
        """
        times = start + np.arange(frames) / self.fps
        picks = (times * self.source_fps + 1e-6).astype(int).clip(max=len(video) - 1)
        video = np.broadcast_to(video, (*video.shape[:3], 3))  # of 1 or 3 channels
        clip = np.stack([media.fit(video[pick], self.size) for pick in picks])

        sound = np.zeros(sample_count(frames, self.fps, self.sample_rate), np.float32)
        if audio is not None:
            scale = 32768 if audio.dtype.kind == "i" else 1
            low = round(start * self.source_sample_rate)
            high = low + int(np.ceil(frames / self.fps * self.source_sample_rate))
            part = audio[low:high].astype(np.float32) / scale
            part = part.mean(axis=1) if part.ndim == 2 else part
            part = media.resample(part, self.source_sample_rate, self.sample_rate)[: len(sound)]
            sound[: len(part)] = part.clip(-1, 1)
        return clip, sound
