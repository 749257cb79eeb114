"""Clips that are cut, measured and stored once: each video's clips in a file, and all files as one data set of TFDS.

The file of a video follows from the video and the settings alone, and appears only when it is complete. The data set
follows from the files alone. So an interrupted run goes on, and gives the same bits.
"""

import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vdm_jax.data import scenes, whole
from vdm_jax.data.tfds import package
from vdm_jax.errors import UserError
from vdm_jax.run import storage

VERSION = 1  # of what a clip is and how it is stored
DROPS = {"still": "it stands still", "black": "it is black", "silent": "it is silent"}
DUPLICATE = "an earlier clip has the same frames and sound"
NAME = "clips"  # of the data set
SHARD_BYTES = 256 << 20  # of clips before they are compressed
SIZE_BYTES = 8  # before each clip in the file of a video


class Settings(NamedTuple):
    """What decides the clips of a video."""

    data: dict  # config.data
    scene_threshold: float  # of scenes.changes; from it on, a frame begins a clip
    max_seconds: float  # of a clip
    drop: tuple  # names of DROPS

    def facts(self) -> dict:
        """Returns what the clips depend on, for a hash and for messages. The videos have hashes of their own."""
        names = ("fps", "sample_rate")
        return {
            **{name: self.data[name] for name in names},
            "size": list(self.data["size"]),
            "scene_threshold": self.scene_threshold,
            "max_seconds": self.max_seconds,
            "drop": sorted(self.drop),
            "version": VERSION,
        }

    def key(self, video: whole.Video) -> str:
        """Returns the name of the file of a video's clips."""
        values = video._replace(split="", place="")  # neither decides the clips
        return hashlib.sha256(json.dumps([self.facts(), values], sort_keys=True).encode()).hexdigest()


def features(size):
    """Returns the TFDS features of a clip. TensorFlow is needed for none of them.

    ArrayRecord compresses each clip with Zstandard. So the frames are stored as they are, which reads fastest.
    """
    tfds = package()
    height, width = size
    tensor, text = tfds.features.Tensor, tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "video": tensor(shape=(None, height, width, 3), dtype=np.uint8, encoding="bytes"),
            "audio": tensor(shape=(None,), dtype=np.int16, encoding="bytes"),
            "caption": tfds.features.Sequence(text()),
            "source": text(),  # name of the video
            "start": np.float32,  # of the clip in the video, in s
            "end": np.float32,
            "height": np.int32,  # of the video in pixels; 0 where it is not known
            "width": np.int32,
            "source_fps": np.float32,  # of the video; 0 for an image, or where it is not known
            "source_sha256": text(),
            "sha256": text(),  # of the frames and the sound
        }
    )


def cut(pieces, settings: Settings) -> Iterator[tuple[int, np.ndarray, np.ndarray, list]]:
    """Yields (number of the first frame, frames, sound, captions) of each clip of a video.

    pieces: as whole.pieces yields them
    """
    rate = settings.data["sample_rate"] / settings.data["fps"]  # samples a frame
    most = max(1, int(settings.max_seconds * settings.data["fps"]))
    frames, first, sound = [], 0, np.zeros(0, np.float32)

    def clip(captions):
        count = round((first + len(frames)) * rate) - round(first * rate)
        own = sound[:count]
        return first, np.stack(frames), np.pad(own, (0, count - len(own))), captions

    for video, audio, captions in pieces:
        before = [frames[-1]] if frames else [video[0]]
        begins = scenes.changes(np.concatenate([before, video])) >= settings.scene_threshold
        sound = np.concatenate([sound, audio])
        for frame, is_new in zip(video, begins):
            if frames and (is_new or len(frames) == most):
                done = clip(captions)
                yield done
                first, sound, frames = first + len(frames), sound[len(done[2]) :], []
            frames.append(frame)
    if frames:
        yield clip(captions)


def _fault(video: np.ndarray, audio: np.ndarray, is_image: bool, drop) -> str:
    """Returns the name in `drop` of what is wrong with a clip, or ""."""
    measures = {
        "black": lambda: scenes.is_black(video),
        "still": lambda: not is_image and scenes.is_still(video),
        "silent": lambda: not is_image and scenes.is_silent(audio),
    }
    return next((name for name, measure in measures.items() if name in drop and measure()), "")


def write_clips(folder: str, video: whole.Video, settings: Settings) -> None:
    """Writes the clips of a video to FOLDER/KEY.clips, and what became of each to FOLDER/KEY.json, which comes last.

    A video that cannot be read has a "fault" there, in place of the clips from the fault on.
    """
    from tensorflow_datasets.proto import tf_example_pb2

    data, made = ConfigDict(settings.data), features(settings.data["size"])
    path, rows, faults = epath.Path(folder) / settings.key(video), [], []

    def pieces():
        try:
            yield from whole.pieces(video, data)
        except UserError as error:
            faults.append(str(error))

    with storage.writing(path.with_suffix(".clips")) as file:
        for first, frames, sound, captions in cut(pieces(), settings):
            start, end = first / data.fps, (first + len(frames)) / data.fps
            audio = np.rint(sound.clip(-1, 1) * 32767).astype(np.int16)
            digest = hashlib.sha256(f"{frames.shape}".encode() + frames.tobytes() + audio.tobytes()).hexdigest()
            fault = _fault(frames, sound, video.is_image, settings.drop)
            rows.append({"start": start, "end": end, "sha256": digest, "dropped": fault, "bytes": 0})
            if fault:
                continue
            height, width = video.shape or (0, 0)
            example = {
                "video": frames,
                "audio": audio,
                "caption": whole.captions_of(captions, start, end),
                "source": video.name.encode(errors="backslashreplace").decode(),
                "start": start,
                "end": end,
                "height": height,
                "width": width,
                "source_fps": video.fps,
                "source_sha256": video.sha256,
                "sha256": digest,
            }
            # Protocol buffers have no order of their own.
            proto = tf_example_pb2.Example.FromString(made.serialize_example(example))
            content = proto.SerializeToString(deterministic=True)
            rows[-1]["bytes"] = len(content)
            file.write(len(content).to_bytes(SIZE_BYTES, "little") + content)
    storage.write_json(path.with_suffix(".json"), {"clips": rows, "fault": " ".join(faults)})


def read_rows(folder, key: str) -> dict | None:
    """Returns {'clips', 'fault'} of a video that `write_clips` has finished, else None."""
    path = epath.Path(folder) / f"{key}.json"
    try:
        return storage.read_json(path, "it is made again") if path.exists() else None
    except UserError:  # damaged
        return None


def _stored(path) -> Iterator[bytes]:
    """Yields the clips in the file of a video, as TFDS stores them."""
    with path.open("rb") as file:
        while size := file.read(SIZE_BYTES):
            yield file.read(int.from_bytes(size, "little"))


def write_clips_of(values: tuple, folder: str, settings: tuple) -> None:
    """Does what `write_clips` does, with the plain values that Beam hands to its workers."""
    write_clips(folder, whole.Video(*values), Settings(*settings))


def merge(out, parts, chosen: dict, size) -> None:
    """Writes the data set. The clips of a split are in the order of `chosen`.

    out: folder of the data set
    parts: folder of the videos' files
    chosen: {split: [(key of a video, [(number of a stored clip, its size in bytes)])]}
    """
    in_bucket = storage.in_bucket(out)
    with tempfile.TemporaryDirectory(dir=None if in_bucket else parts) as scratch:
        splits = [_write_split(scratch, parts, name, videos) for name, videos in chosen.items() if videos]
        package().folder_dataset.write_metadata(
            data_dir=scratch, features=features(size), split_infos=splits, check_data=False, disable_shuffling=True
        )
        for old in epath.Path(out).glob(f"{NAME}-*"):  # of an interrupted run
            old.unlink()
        for path in sorted(epath.Path(scratch).iterdir()):
            path.copy(epath.Path(out) / path.name, overwrite=True)


def _write_split(folder, parts, name: str, videos):
    """Writes the shards of a split, and returns the SplitInfo of TFDS."""
    from array_record.python.array_record_module import ArrayRecordWriter

    shards = [[]]  # of (key of a video, number of a clip)
    total = filled = 0
    for key, clips in videos:
        for number, count in clips:
            if filled + count > SHARD_BYTES and shards[-1]:
                shards, filled = [*shards, []], 0
            shards[-1].append((key, number))
            total, filled = total + count, filled + count
    template = package().core.ShardedFileTemplate(
        data_dir=epath.Path(folder), dataset_name=NAME, split=name, filetype_suffix="array_record"
    )
    for index, shard in enumerate(shards):
        path = template.sharded_filepath(shard_index=index, num_shards=len(shards))
        writer = ArrayRecordWriter(os.fspath(path), "group_size:1")  # as TFDS does, for random access
        for key, clips in itertools.groupby(shard, key=lambda clip: clip[0]):
            numbers = {number for _, number in clips}
            for number, content in enumerate(_stored(epath.Path(parts) / f"{key}.clips")):
                if number in numbers:
                    writer.write(content)
        writer.close()
    lengths = [len(shard) for shard in shards]
    return package().core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=total, filename_template=template)
