"""Reads and writes MP4 files with sound, reads sound files and images. A path may also be a `Part`.

PyAV encodes and decodes; its wheels carry FFmpeg with libx264 and AAC. Pillow reads images. A video is uint8
[F, H, W, 3], a sound is mono float32 [N] in [-1, 1], a size is h = w or (h, w) in pixels, and rates are in Hz. A file
that cannot be read raises a UserError of one line that names the file.
"""

import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation
from etils import epath
from PIL import Image, ImageOps

from vdm_jax.data.shards import Part
from vdm_jax.errors import UserError
from vdm_jax.run import storage

# The formats that FFmpeg may open. A playlist, for example, would make it open other files or URLs.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,gif,ogg,wav,mp3,flac,aac,aiff,asf"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_FILE_BYTES = 4 << 30
MAX_SOURCE_FRAMES = 50_000  # decoded by one call
MAX_PIXELS = 64_000_000  # of one frame or image
MAX_OUTPUT_BYTES = 1 << 30  # of one decoded clip
# WebM counts time in steps of 1 ms: a frame that is due at 1/24 s = 0.0417 s has the time stamp 0.042 s.
TIME_TOLERANCE = Fraction(1001, 1_000_000)  # s
# The fast conversions of swscale darken a picture by one level of 255 and blur color over edges. The exact conversions
# take 4 ms a frame of 720p.
TO_YUV = Interpolation.AREA | Interpolation.ACCURATE_RND
TO_RGB = Interpolation.POINT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@contextlib.contextmanager
def replacing(path) -> Iterator[str]:
    """Yields the name of a temporary file, which becomes `path` if the block succeeds and is removed if it fails.

    A reader therefore sees the old file or the complete new file, never half of one. Raises UserError if the file
    cannot be written.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    in_bucket = storage.in_bucket(path)
    if folder and not in_bucket and not os.path.isdir(folder):
        raise UserError(f"cannot write {path!r}: there is no folder {folder!r}, make it first")
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=None if in_bucket else folder or ".") as scratch:
            temporary = os.path.join(scratch, f".{name}")
            yield temporary
            if in_bucket:
                epath.Path(temporary).copy(path, overwrite=True)
            else:
                os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path!r}: {error.strerror or error}") from error


def write_mp4(path, video, audio, fps, sample_rate) -> None:
    """Writes an MP4 file: H.264 (yuv420p) with AAC sound (mono, 48 kHz).

    A small video is enlarged: each pixel is repeated until the short side has at least 256. yuv420p needs even sizes:
    an odd height or width repeats its last row or column. The file appears only when it is complete.

    video: uint8 [F, H, W, 3]
    audio: float [N], from the start of frame 0, clipped to [-1, 1]; NaN becomes silence. None: a file without sound

    Raises UserError if the file cannot be written, ValueError if an array has the wrong type or shape.
    """
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video must be uint8 [F, H, W, 3], not {video.dtype} {video.shape}")
    upscale = math.ceil(256 / min(video.shape[1:3]))
    height, width = (upscale * n for n in video.shape[1:3])
    rate = Fraction(fps).limit_denominator(1_001_000)
    if audio is not None:
        audio = np.nan_to_num(np.asarray(audio, np.float32), posinf=1, neginf=-1).clip(-1, 1)
        if audio.ndim != 1:
            raise ValueError(f"audio must be [N], not {audio.shape}")

    # The muxer sorts all packets by time, with any delay: a player finds the sound of a frame next to the frame.
    options = {"movflags": "+faststart", "max_interleave_delta": "0"}
    with replacing(path) as temporary, av.open(temporary, "w", format="mp4", options=options) as out:
        # Without B-frames the first frame has time 0, even in players that ignore edit lists.
        picture = out.add_stream("libx264", rate=rate, options={"crf": "16", "bf": "0"})
        picture.width, picture.height = width + width % 2, height + height % 2
        picture.pix_fmt, picture.time_base = "yuv420p", 1 / rate
        # swscale converts by BT.601 in the limited range. Without these marks a player has to guess.
        picture.codec_context.colorspace = 6  # BT.601
        picture.codec_context.color_range = 1  # limited
        if audio is not None and len(audio):
            # AAC begins with 1024 extra samples, which some players do not skip, and blurs onsets over its blocks. At
            # 48 kHz the extra samples last 21 ms; at a model's 8 kHz they would last 128 ms.
            sound = out.add_stream("aac", rate=48_000, layout="mono")
            sound.bit_rate = 192_000  # at the default rate, a tone or a click has noise only 20 dB below it
            samples = av.AudioFrame.from_ndarray(audio[None], "fltp", "mono")
            samples.sample_rate, samples.pts, samples.time_base = sample_rate, 0, Fraction(1, sample_rate)
            out.mux(sound.encode(samples))
            out.mux(sound.encode(None))
        for index, image in enumerate(video):
            image = image.repeat(upscale, axis=0).repeat(upscale, axis=1)
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", interpolation=TO_YUV)
            frame.pts, frame.time_base = index, 1 / rate
            out.mux(picture.encode(frame))
        out.mux(picture.encode(None))


@contextlib.contextmanager
def _reading(path) -> Iterator[None]:
    """Turns any error of the block into a UserError that names the file."""
    try:
        on_disk = path.archive if isinstance(path, Part) else path
        if not os.path.isfile(on_disk):
            raise UserError("not a file" if os.path.exists(on_disk) else "no such file")
        size = path.size if isinstance(path, Part) else os.path.getsize(path)
        if size == 0:
            raise UserError("the file is empty")
        if size > MAX_FILE_BYTES:
            raise UserError(f"its {size} bytes are over the limit of {MAX_FILE_BYTES}, cut it into pieces")
        yield
    except Exception as error:  # InvalidDataError, EOFError, MemoryError, UnicodeDecodeError, ...
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        name = path.name if isinstance(path, Part) else os.path.basename(os.fspath(path)) or os.fspath(path)
        raise UserError(f"cannot read {name!r}: {reason or type(error).__name__}") from error


def _open(path):
    # With "file:", a colon in a name is not taken for a protocol. Tags that are not UTF-8 are no error.
    options = {"format_whitelist": CONTAINERS}
    source = path.open() if isinstance(path, Part) else "file:" + os.fspath(path)
    return av.open(source, options=options, metadata_errors="replace")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"{width}x{height} is over the limit of {MAX_PIXELS} pixels")


def _video_stream(container):
    if not container.streams.video:
        raise UserError("it has no video stream")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise UserError("its video codec is unknown")
    _check_pixels(stream.codec_context.width, stream.codec_context.height)
    return stream


def _origin(stream) -> Fraction:
    """Returns the stream's first time stamp, in s."""
    return Fraction(stream.start_time or 0) * (stream.time_base or 0)


def _step(stream) -> Fraction:
    """Returns how long a frame lasts on average, in s."""
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)


def pair(size) -> tuple[int, int]:
    """Returns (height, width) of a size."""
    height, width = (size, size) if np.ndim(size) == 0 else size
    return int(height), int(width)


def fit(image: np.ndarray, size, pixel_aspect: float = 1.0) -> np.ndarray:
    """Returns an image uint8 [H, W, 3] scaled until it covers the size, and cropped around its center: uint8 [h, w, 3].

    pixel_aspect: width / height of a pixel of `image`
    """
    (height, width), (full_h, full_w) = pair(size), image.shape[:2]
    ratio = min(full_h / height, full_w * pixel_aspect / width)  # source pixels per target pixel
    crop_h, crop_w = min(height * ratio, full_h), min(width * ratio / pixel_aspect, full_w)
    top, left = (full_h - crop_h) / 2, (full_w - crop_w) / 2
    # Where the ratio is a whole number the average of the pixels is exact, and undoes the upscaling of write_mp4.
    exact = ratio == int(ratio) and pixel_aspect == 1
    kind = Image.Resampling.BOX if exact else Image.Resampling.LANCZOS
    image = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(image.resize((width, height), kind, (left, top, left + crop_w, top + crop_h)))


def probe(path) -> dict:
    """Returns {'duration': s from the first frame on, 'has_audio': bool, 'size': (h, w), 'fps'} of a video.

    The size is in pixels, as the first frame is shown: turned upright, and as wide as square pixels would be. The
    duration is the header's; where the header states none, all packets are read. Raises UserError if the first frame
    cannot be decoded.
    """
    with _reading(path), _open(path) as container:
        stream = _video_stream(container)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise UserError("none of its frames can be decoded")
        size = frame.height, round(frame.width * float(stream.sample_aspect_ratio or 1))
        size = size[::-1] if _turns(frame) % 2 else size
        duration = 0
        if stream.duration and stream.time_base:
            duration = stream.duration * stream.time_base
        elif container.duration:
            end = Fraction(container.duration + (container.start_time or 0), av.time_base)
            duration = end - _origin(stream)
        if duration <= 0:
            stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            last = max(stamps, default=0) * stream.time_base - _origin(stream)
            duration = max(last, 0) + _step(stream)
        found = {"duration": float(duration), "has_audio": bool(container.streams.audio), "size": size}
        return found | {"fps": float(1 / _step(stream))}


def _turns(frame):
    """Returns by how many right angles a frame is turned to be upright: phones store a rotation beside the frames."""
    return round((frame.rotation or 0) / 90)


def _shown_frames(container, stream, start: Fraction) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Yields (frame, end of its show in s from the stream's start), from `start` or an earlier frame on."""

    def decode(at):
        if start > 0:
            container.seek(int((at + _origin(stream)) / stream.time_base), stream=stream)
        time = -_step(stream)
        for frame in container.decode(stream):
            stamp = frame.dts if frame.pts is None else frame.pts
            time = time + _step(stream) if stamp is None else stamp * stream.time_base - _origin(stream)
            yield time, frame

    frames = decode(start)
    first = next(frames, None)
    if start > 0 and (first is None or first[0] > start + TIME_TOLERANCE):  # the file's index is wrong
        frames = decode(0)
        first = next(frames, None)
    if first is None:
        raise UserError("none of its frames can be decoded")
    shown = None
    for count, (time, frame) in enumerate(itertools.chain([first], frames)):
        if count >= MAX_SOURCE_FRAMES:
            raise UserError(f"it has over {MAX_SOURCE_FRAMES} frames to decode, cut it into pieces")
        _check_pixels(frame.width, frame.height)
        if shown is not None:
            yield shown, time
        shown = frame
    # A file of a single frame may state a length of zero; its frame is shown all the same.
    yield shown, max(time + (shown.duration * stream.time_base or _step(stream)), 2 * TIME_TOLERANCE)


def read_video(path, *, fps, size, sample_rate, start=0.0, frames=None) -> tuple[np.ndarray, np.ndarray]:
    """Returns a clip of a video file with its sound: uint8 [F, h, w, 3] and float32 [F * sample_rate // fps].

    Frame k is the frame that the file shows `start + k / fps` seconds after its first frame. Time stamps decide, so
    a variable frame rate is read correctly. Each frame is turned upright, scaled and cropped by `fit`. The sound is
    mixed to mono and begins with the picture.

    start: of the clip, in s
    frames: F; after the end of the file the last frame is repeated, in silence. None reads to the end.

    Raises UserError if the file cannot be read, ends before `start` or is over a limit.
    """
    height, width = pair(size)
    rate = Fraction(fps).limit_denominator(1_001_000)
    begin = Fraction(start).limit_denominator(1_000_000_000)
    max_frames = MAX_OUTPUT_BYTES // (height * width * 3)
    too_long = f"it gives over {max_frames} frames of {height}x{width} at {float(rate):g} fps, ask for fewer"
    images = []
    with _reading(path):
        if (frames or 0) > max_frames:
            raise UserError(too_long)
        with _open(path) as container:
            stream = _video_stream(container)
            origin = _origin(stream)
            for frame, end in _shown_frames(container, stream, begin):
                due = math.ceil((end - TIME_TOLERANCE - begin) * rate)  # frames of the clip that begin before `end`
                due = due if frames is None else min(due, frames)
                if due > max_frames:
                    raise UserError(too_long)
                if due > len(images):
                    aspect = float(stream.sample_aspect_ratio or 1)
                    image = np.rot90(frame.to_ndarray(format="rgb24", interpolation=TO_RGB), _turns(frame))
                    image = fit(image, size, 1 / aspect if _turns(frame) % 2 else aspect)
                    images += [image] * (due - len(images))
                if due == frames:
                    break
        if not images:
            raise UserError(f"it ends at {float(end):g} s, before the start of the clip at {start:g} s")
        if frames is not None:
            images += images[-1:] * (frames - len(images))
        audio = np.zeros(int(len(images) * sample_rate / rate), np.float32)
        # The file is opened again: a seek for the sound would move the picture, too.
        with _open(path) as container:
            if container.streams.audio:
                _decode_audio(container, origin + begin, sample_rate, audio)
    return np.stack(images), audio


def _decode_audio(container, begin: Fraction, sample_rate: int, audio: np.ndarray) -> None:
    """Fills `audio` float32 [N] with the sound from `begin` on (s on the file's clock)."""
    stream = container.streams.audio[0]
    # With 16-bit samples, swresample scales a mix of channels so that it cannot exceed full scale.
    resampler = av.AudioResampler(format="s16", layout="mono", rate=sample_rate)
    if begin > _origin(stream):  # a quarter of a second early, as the first samples after a seek are inexact
        early = max(_origin(stream), begin - Fraction(1, 4))
        container.seek(int(early / stream.time_base), stream=stream)
    position = None  # of the next chunk, in samples
    for frame in itertools.chain(container.decode(stream), [None]):
        for chunk in resampler.resample(frame):
            data = chunk.to_ndarray()[0].astype(np.float32) / 32768
            if chunk.pts is not None:
                at = round((chunk.pts * chunk.time_base - begin) * sample_rate)
                # Time stamps are rounded. Only a gap of more than 20 ms moves the sound.
                if position is None or abs(at - position) > 0.02 * sample_rate:
                    position = at
            position = position or 0
            low, high = max(position, 0), min(position + len(data), len(audio))
            if low < high:
                audio[low:high] = data[low - position : high - position]
            position += len(data)
        if position is not None and position >= len(audio):
            return


def read_audio(path, sample_rate: int, seconds: float) -> np.ndarray:
    """Returns the beginning of a file's first sound track, mixed to mono: float32 [round(seconds * sample_rate)].

    It is silent after the end of the track. Raises UserError if the file cannot be read or has no sound.
    """
    with _reading(path), _open(path) as container:
        if not container.streams.audio:
            raise UserError("it has no sound")
        audio = np.zeros(round(seconds * sample_rate), np.float32)
        _decode_audio(container, _origin(container.streams.audio[0]), sample_rate, audio)
        return audio


def resample(audio, from_rate: int, to_rate: int) -> np.ndarray:
    """Returns a sound float [N] at another sample rate: float32 [N * to_rate // from_rate]."""
    audio = np.asarray(audio, np.float32)
    if from_rate == to_rate or not len(audio):
        return audio
    resampler = av.AudioResampler(format="flt", layout="mono", rate=to_rate)
    frame = av.AudioFrame.from_ndarray(audio[None], "flt", "mono")
    frame.sample_rate = from_rate
    chunks = resampler.resample(frame) + resampler.resample(None)
    result = np.zeros(len(audio) * to_rate // from_rate, np.float32)
    data = np.concatenate([chunk.to_ndarray()[0] for chunk in chunks])[: len(result)]
    result[: len(data)] = data
    return result


def read_image(path, size=None) -> np.ndarray:
    """Returns an image, turned upright, uint8 [h, w, 3], scaled and cropped by `fit` to a size. Raises UserError."""
    with _reading(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        _check_pixels(image.width, image.height)  # before any pixel is decompressed
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would make all 16-bit gray white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        pixels = np.asarray(image.convert("RGB"))
        return pixels if size is None else fit(pixels, size)
