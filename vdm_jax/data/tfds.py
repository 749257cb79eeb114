"""A built data set of TensorFlow Datasets (TFDS) as an endless random-access source, without TensorFlow.

The data set must be stored as array_record: build it with `file_format="array_record"`. Its features must be Tensor,
Scalar, Text, ClassLabel or sequences of them. The features Video, Image and Audio need TensorFlow to be decoded.
"""

import functools
import os

import numpy as np
from etils import epath

from vdm_jax.data import media
from vdm_jax.errors import UserError


@functools.lru_cache(maxsize=8)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns the order of the examples in an epoch: a permutation, int [count]."""
    return np.random.default_rng([seed, epoch]).permutation(count)


class Tfds:
    """Random windows of a data set's videos, without end. Item i follows from (seed, i).

    An item is {'video': uint8 [F, h, w, 3], 'audio': float32 [F * sample_rate // fps], 'caption': str}. Where a video
    is shorter than a window, its last frame is repeated. In each epoch every example comes once.

    name: of a data set in `data_dir`, or the folder of a built data set
    frames: F, frames of a window
    size: h = w, or (h, w)
    fps: frames per second of a window
    sample_rate: of the sound of a window, in Hz
    seed: of the order of examples and of the windows
    split: in the notation of TFDS; "train[:90%]" and "train[90%:]" share no example
    data_dir: folder of the built data sets; None is TFDS's default
    video_key: feature of uint8 [T, H, W, 3], or with 1 channel
    audio_key: feature of float in [-1, 1] or of int16, [N] or [N, channels], which begins with the video; "" for
        silent clips
    caption_key: feature of a text, of several texts, of which one is drawn, or of a class label; "" for the empty text
    source_fps: frames per second of the data set's videos; None or 0 is `fps`
    source_sample_rate: of the data set's sound, in Hz; None or 0 is `sample_rate`
    length: number of items

    Raises UserError if the data set cannot be read.
    """

    def __init__(
        self,
        name: str,
        *,
        frames: int,
        size: int | tuple[int, int],
        fps: float,
        sample_rate: int,
        seed: int,
        split: str = "train",
        data_dir: str | None = None,
        video_key: str = "video",
        audio_key: str = "",
        caption_key: str = "",
        source_fps: float | None = None,
        source_sample_rate: int | None = None,
        length: int = 2**31 - 1,
    ):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise UserError(
                "data sets of TFDS need two packages: pip install tensorflow-datasets array-record"
            ) from error
        if not name:
            raise UserError(
                "data.tfds.name is empty: name a data set in data.path, or its folder, --config.data.tfds.name=NAME"
            )
        self.name = os.fspath(name)
        self.frames = frames
        self.size = size
        self.fps = fps
        self.sample_rate = sample_rate
        self.seed = seed
        self.length = length
        self.source_fps = source_fps or fps
        self.source_sample_rate = source_sample_rate or sample_rate
        self.keys = (video_key, audio_key, caption_key)
        try:
            if epath.Path(self.name).is_dir():
                builder = tfds.builder_from_directory(self.name)
            else:
                builder = tfds.builder(self.name, data_dir=data_dir, try_gcs=False)
            self.source = builder.as_data_source(split=split)
            self.features = builder.info.features
            count = len(self.source)
        except Exception as error:  # each fault has an error of its own: unknown, not built, another format
            raise UserError(self._fault(f"split {split!r} cannot be opened", error)) from error
        for key in (video_key, *filter(None, self.keys[1:])):
            if key not in self.features:
                known = ", ".join(self.features)
                raise UserError(f"data set {self.name!r} has no feature {key!r}, only {known}: name one of them")
        if not count:
            raise UserError(f"data set {self.name!r}: split {split!r} is empty")
        self._read(0)  # an example that cannot be decoded ends the run now, not after an hour

    def _fault(self, what: str, error: Exception) -> str:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"data set {self.name!r}: {what} ({reason})"

    def _read(self, index: int):
        """Returns (video uint8 [T, H, W, C], audio or None, captions) of an example."""
        video_key, audio_key, caption_key = self.keys
        try:
            example = self.source[int(index)]
        except Exception as error:
            what = f"example {index} cannot be decoded; its features may need TensorFlow"
            raise UserError(self._fault(what, error)) from error
        video = np.asarray(example[video_key])
        if video.ndim != 4 or video.dtype != np.uint8 or video.shape[-1] not in (1, 3) or not video.size:
            found = f"{video.dtype} {list(video.shape)}"
            raise UserError(f"data set {self.name!r}: {video_key!r} is {found}, not uint8 [T, H, W, 3]")
        audio = np.asarray(example[audio_key]) if audio_key else None
        if audio is not None and (audio.ndim not in (1, 2) or audio.dtype.kind not in "fi"):
            found = f"{audio.dtype} {list(audio.shape)}"
            raise UserError(f"data set {self.name!r}: {audio_key!r} is {found}, not float [N]")
        if not caption_key:
            return video, audio, [""]
        captions = np.asarray(example[caption_key]).ravel()
        if hasattr(self.features[caption_key], "int2str"):
            captions = [self.features[caption_key].int2str(int(c)) for c in captions]
        texts = [c.decode("utf-8", "replace") if isinstance(c, bytes) else str(c) for c in captions]
        return video, audio, texts or [""]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        if not -self.length <= i < self.length:
            raise IndexError(i)
        i = int(i) % self.length
        epoch, place = divmod(i, len(self.source))
        where, which = np.random.default_rng([self.seed, i]).random(2)
        order = _order(self.seed, epoch, len(self.source))
        video, audio, captions = self._read(order[place])

        total = int(len(video) * self.fps / self.source_fps + 1e-6)  # frames of the video at `fps`
        start = int(where * (max(0, total - self.frames) + 1)) / self.fps  # s
        times = start + np.arange(self.frames) / self.fps
        picks = (times * self.source_fps + 1e-6).astype(int).clip(max=len(video) - 1)
        video = np.repeat(video, 3 // video.shape[-1], axis=-1)
        clip = np.stack([media.fit(video[pick], self.size) for pick in picks])

        sound = np.zeros(int(self.frames * self.sample_rate // self.fps), np.float32)
        if audio is not None:
            scale = 32768 if audio.dtype.kind == "i" else 1
            low = round(start * self.source_sample_rate)
            high = low + int(np.ceil(self.frames / self.fps * self.source_sample_rate))
            part = audio[low:high].astype(np.float32) / scale
            part = part.mean(axis=1) if part.ndim == 2 else part
            part = media.resample(part, self.source_sample_rate, self.sample_rate)[: len(sound)]
            sound[: len(part)] = part.clip(-1, 1)
        return {"video": clip, "audio": sound, "caption": captions[int(which * len(captions))]}
