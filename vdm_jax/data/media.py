"""Files in and out: MP4 with sound, images, sound files, contact sheets and spectrograms.

PyAV does the coding (its wheels carry FFmpeg with libx264 and AAC), Pillow the images. Arrays are
video uint8 [F, H, W, 3] and mono audio float32 [N] in [-1, 1]. Whatever is wrong with a file that
is read becomes one UserError line that names it.
"""

import contextlib
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

from vdm_jax.errors import UserError
from vdm_jax.run import storage

# What a file may turn out to be. A playlist, say, could make FFmpeg open further files or URLs.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,gif,ogg,wav,mp3,flac,aac,aiff,asf"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_FILE_BYTES = 4 << 30
MAX_SOURCE_FRAMES = 50_000  # decoded in one call
MAX_PIXELS = 64_000_000  # of one frame or image
MAX_OUTPUT_BYTES = 1 << 30  # of one decoded clip
# Ticks may be as coarse as 1 ms (WebM): a frame due at 1/24 s is then stamped 0.042 s.
TIME_TOLERANCE = Fraction(1001, 1_000_000)  # s
AAC_RATE = 48_000  # Hz
# swscale's quick paths darken by one level and bleed color over edges; these cost 4 ms at 720p.
TO_YUV = Interpolation.AREA | Interpolation.ACCURATE_RND
TO_RGB = Interpolation.POINT | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


# ------------------------------------------------------------------------------------------ writing


@contextlib.contextmanager
def replacing(path) -> Iterator[str]:
    """Yields a temporary name that becomes `path` if the block succeeds and is removed if not."""
    path = os.fspath(path)
    if storage.in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            temporary = os.path.join(folder, os.path.basename(path))
            try:
                yield temporary
                epath.Path(temporary).copy(path, overwrite=True)
            except OSError as error:
                raise UserError(f"cannot write {path!r}: {error.strerror or error}") from error
        return
    folder, name = os.path.split(path)
    if folder and not os.path.isdir(folder):
        raise UserError(f"cannot write {path!r}: there is no folder {folder!r}")
    temporary = os.path.join(folder, f".{os.getpid()}.{name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path!r}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def write_mp4(path, video, audio, fps, sample_rate, upscale: int | None = None) -> None:
    """Writes H.264 (yuv420p) with AAC (mono, 48 kHz), or with no sound track if `audio` is None.

    video: uint8 [F, H, W, 3] at `fps` (frames/s). audio: float [N] at `sample_rate` (Hz) from the
    start of frame 0; it is clipped to [-1, 1], NaN becomes silence. `upscale` repeats each pixel
    that many times both ways; by default small videos grow until the short side has at least 256
    pixels. yuv420p needs even sizes, so an odd height or width repeats its last row or column.
    The file takes its name only when it is complete. Raises UserError if it cannot be written.
    """
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video must be uint8 [F, H, W, 3], not {video.dtype} {video.shape}")
    if upscale is None:
        upscale = math.ceil(256 / min(video.shape[1:3]))
    height, width = (upscale * n for n in video.shape[1:3])
    rate = Fraction(fps).limit_denominator(1_001_000)
    if audio is not None:
        audio = np.nan_to_num(np.asarray(audio, np.float32), posinf=1, neginf=-1).clip(-1, 1)
        if audio.ndim != 1:
            raise ValueError(f"audio must be [N], not {audio.shape}")

    with (
        replacing(path) as temporary,
        av.open(temporary, "w", format="mp4", options={"movflags": "+faststart"}) as out,
    ):
        # Without B-frames the first frame has time 0 even for players that ignore edit lists.
        picture = out.add_stream("libx264", rate=rate, options={"crf": "16", "bf": "0"})
        picture.width, picture.height = width + width % 2, height + height % 2
        picture.pix_fmt, picture.time_base = "yuv420p", 1 / rate
        # swscale converts by BT.601 (6) in the limited range (1): say so, or players guess.
        picture.codec_context.colorspace, picture.codec_context.color_range = 6, 1
        if audio is not None:
            # 48 kHz, not the model's rate: AAC's 1024 priming samples are then 21 ms and not 128
            # (for players that ignore the edit list), and its blocks smear onsets less.
            sound = out.add_stream("aac", rate=AAC_RATE, layout="mono")
            sound.bit_rate = 192_000  # by default a tone or a click has noise 20 dB below it
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=AAC_RATE)
        sent = 0
        for index, image in enumerate(video):
            image = image.repeat(upscale, axis=0).repeat(upscale, axis=1)
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", interpolation=TO_YUV)
            frame.pts, frame.time_base = index, 1 / rate
            out.mux(picture.encode(frame))
            if audio is None:
                continue
            # Sound goes in beside the frame it belongs to: an interleaved file streams well.
            last = index == len(video) - 1
            until = len(audio) if last else min(int((index + 1) * sample_rate / rate), len(audio))
            chunks = []
            if until > sent:
                chunk = av.AudioFrame.from_ndarray(audio[None, sent:until], "fltp", "mono")
                chunk.sample_rate, chunk.time_base = sample_rate, Fraction(1, sample_rate)
                chunk.pts, sent = sent, until
                chunks = resampler.resample(chunk)
            for chunk in chunks + (resampler.resample(None) if last else []):
                out.mux(sound.encode(chunk))
        out.mux(picture.encode(None))
        if audio is not None:
            out.mux(sound.encode(None))


# ------------------------------------------------------------------------------------------ reading


@contextlib.contextmanager
def _reading(path, max_bytes: int = MAX_FILE_BYTES) -> Iterator[None]:
    """Whatever fails in the block becomes a UserError that names the file."""
    try:
        if not os.path.isfile(path):
            raise UserError("not a file" if os.path.exists(path) else "no such file")
        size = os.path.getsize(path)
        if size == 0:
            raise UserError("the file is empty")
        if size > max_bytes:
            raise UserError(f"{size} bytes is over the limit of {max_bytes}, cut it into pieces")
        yield
    except Exception as error:  # InvalidDataError, EOFError, MemoryError, UnicodeDecodeError, ...
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        name = os.path.basename(os.fspath(path)) or os.fspath(path)
        raise UserError(f"cannot read {name!r}: {reason or type(error).__name__}") from error


def _open(path):
    # "file:" so that a colon in a name is not taken for a protocol. Tags need not be UTF-8.
    options = {"format_whitelist": CONTAINERS}
    return av.open("file:" + os.fspath(path), options=options, metadata_errors="replace")


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
    """The stream's first time stamp in seconds."""
    return Fraction(stream.start_time or 0) * (stream.time_base or 0)


def _step(stream) -> Fraction:
    """Seconds that a frame lasts on average."""
    return 1 / Fraction(stream.average_rate or stream.guessed_rate or 25)


def _duration(container, stream) -> float:
    """Seconds from the stream's first time stamp, by the header; 0 if that does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if container.duration:
        end = Fraction(container.duration + (container.start_time or 0), av.time_base)
        return max(0.0, float(end - _origin(stream)))
    return 0.0


def _upright(frame) -> np.ndarray:
    """Decoded frame -> uint8 [H, W, 3], with the rotation that phones only write down applied."""
    image = frame.to_ndarray(format="rgb24", interpolation=TO_RGB)
    return np.rot90(image, k=round((frame.rotation or 0) / 90))


def pair(size) -> tuple[int, int]:
    height, width = (size, size) if np.ndim(size) == 0 else size
    return int(height), int(width)


def fit(image: np.ndarray, size, pixel_aspect: float = 1.0) -> np.ndarray:
    """Scales the short side and crops the centre: uint8 [H, W, 3] -> [h, w, 3].

    size: h = w, or (h, w). pixel_aspect: width over height of a source pixel.
    """
    (height, width), (full_h, full_w) = pair(size), image.shape[:2]
    ratio = min(full_h / height, full_w * pixel_aspect / width)  # source pixels per target pixel
    crop_h, crop_w = min(height * ratio, full_h), min(width * ratio / pixel_aspect, full_w)
    top, left = (full_h - crop_h) / 2, (full_w - crop_w) / 2
    # Averaging over a whole ratio is exact, and undoes the upscaling of write_mp4.
    exact = ratio == int(ratio) and pixel_aspect == 1
    kind = Image.Resampling.BOX if exact else Image.Resampling.LANCZOS
    image = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(image.resize((width, height), kind, (left, top, left + crop_w, top + crop_h)))


def probe(path) -> dict:
    """Opens a video and decodes its first frame.

    Returns duration (s, by the header, or by reading on where that does not say), fps (frames/s on
    average), size (height, width; upright) and has_audio. Raises UserError if no frame decodes.
    """
    with _reading(path), _open(path) as container:
        stream = _video_stream(container)
        frame = next(container.decode(stream), None)
        if frame is None:
            raise UserError("no frame of it decodes")
        duration = _duration(container, stream)
        if duration <= 0:
            stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            last = max(stamps, default=0) * stream.time_base - _origin(stream)
            duration = float(max(last, 0) + _step(stream))
        return {
            "duration": duration,
            "fps": float(1 / _step(stream)),
            "size": _upright(frame).shape[:2],
            "has_audio": bool(container.streams.audio),
        }


def _timed_frames(container, stream, start: Fraction) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """(s from the stream's start, frame), beginning at or before the frame on show at `start`."""

    def decode():
        time = -_step(stream)
        for frame in container.decode(stream):
            stamp = frame.dts if frame.pts is None else frame.pts
            if stamp is None:
                time += _step(stream)
            else:
                time = stamp * stream.time_base - _origin(stream)
            yield time, frame

    if start > 0:
        container.seek(int((start + _origin(stream)) / stream.time_base), stream=stream)
    frames = decode()
    first = next(frames, None)
    if start > 0 and (first is None or first[0] > start + TIME_TOLERANCE):  # a poor index
        container.seek(stream.start_time or 0, stream=stream)
        frames = decode()
        first = next(frames, None)
    if first is None:
        raise UserError("no frame of it decodes")
    yield first
    yield from frames


def read_video(
    path,
    *,
    fps: float,
    size: int | tuple[int, int],
    sample_rate: int,
    start: float = 0.0,
    frames: int | None = None,
    max_bytes: int = MAX_FILE_BYTES,
    max_source_frames: int = MAX_SOURCE_FRAMES,
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Reads a clip at the given frames/s, size (h = w, or (h, w)) and sample rate (Hz).

    Output frame k is what the file shows `start + k / fps` seconds after its first frame (by time
    stamps, so a variable frame rate is right), upright, scaled and cropped by `fit`. Sound is mixed
    to mono and begins where the picture begins. With `frames`, exactly that many come back: after
    the file's end its last frame is repeated, without sound; else all there are to the end.

    Returns video uint8 [F, h, w, 3], audio float32 [F * sample_rate // fps] and info: what `probe`
    returns, and repeated_frames, how many at the end are repeats. Raises UserError.
    """
    height, width = pair(size)
    rate = Fraction(fps).limit_denominator(1_001_000)
    begin = Fraction(start).limit_denominator(1_000_000_000)
    max_frames = MAX_OUTPUT_BYTES // (height * width * 3)
    too_long = f"over {max_frames} frames of {height}x{width} at {float(rate):g} fps, ask for fewer"
    images: list[np.ndarray] = []

    def due(time: Fraction) -> bool:
        """Whether the next output is wanted and due before `time`."""
        if len(images) == frames or begin + len(images) / rate + TIME_TOLERANCE >= time:
            return False
        if len(images) >= max_frames:
            raise UserError(too_long)
        return True

    def show(frame) -> np.ndarray:
        aspect = float(stream.sample_aspect_ratio or 1)
        turned = round((frame.rotation or 0) / 90) % 2
        image = _upright(frame)
        info["size"] = image.shape[:2]
        return fit(image, (height, width), 1 / aspect if turned else aspect)

    with _reading(path, max_bytes):
        if (frames or 0) > max_frames:
            raise UserError(too_long)
        with _open(path) as container:
            stream = _video_stream(container)
            origin = _origin(stream)
            info = {"duration": _duration(container, stream), "fps": float(1 / _step(stream))}
            shown = None
            for count, (time, frame) in enumerate(_timed_frames(container, stream, begin)):
                if count >= max_source_frames:
                    raise UserError(f"over {max_source_frames} frames to decode, cut it to pieces")
                _check_pixels(frame.width, frame.height)
                if shown is not None and due(time):
                    image = show(shown)
                    while due(time):
                        images.append(image)
                if len(images) == frames:
                    break
                shown = frame
                end = time + (frame.duration * stream.time_base or _step(stream))
            else:
                # Even a file whose only frame has no length to speak of shows that frame.
                end = max(end, 2 * TIME_TOLERANCE)
                image = show(shown)
                while due(end):
                    images.append(image)
        if not images:
            raise UserError(f"nothing is left of it at {start:g} s, it ends at {float(end):g} s")
        info["repeated_frames"] = 0 if frames is None else frames - len(images)
        images += images[-1:] * info["repeated_frames"]
        audio = np.zeros(int(len(images) * sample_rate / rate), np.float32)
        # A second pass, as one seek cannot serve sound and picture both.
        with _open(path) as container:
            info["has_audio"] = bool(container.streams.audio)
            if info["has_audio"]:
                _decode_audio(container, origin + begin, sample_rate, audio)
    return np.stack(images), audio, info


def _decode_audio(container, begin: Fraction, sample_rate: int, audio: np.ndarray) -> None:
    """Puts the sound from `begin` (s on the file's clock) on into `audio` float32 [N]."""
    stream = container.streams.audio[0]
    # 16 bits because swresample then scales a down-mix so that it cannot exceed full scale.
    resampler = av.AudioResampler(format="s16", layout="mono", rate=sample_rate)
    if begin > _origin(stream):  # a quarter of a second early: decoders need time to settle
        early = max(_origin(stream), begin - Fraction(1, 4))
        container.seek(int(early / stream.time_base), stream=stream)
    position = None  # of the next chunk, in samples

    def place(chunks) -> None:
        nonlocal position
        for chunk in chunks:
            data = chunk.to_ndarray()[0].astype(np.float32) / 32768
            if chunk.pts is not None:
                at = round((chunk.pts * chunk.time_base - begin) * sample_rate)
                # Coarse time stamps jitter: only a real gap moves the sound.
                if position is None or abs(at - position) > 0.02 * sample_rate:
                    position = at
            position = position or 0
            low, high = max(position, 0), min(position + len(data), len(audio))
            if low < high:
                audio[low:high] = data[low - position : high - position]
            position += len(data)

    for frame in container.decode(stream):
        place(resampler.resample(frame))
        if position is not None and position >= len(audio):
            return
    place(resampler.resample(None))


def read_audio(path, sample_rate: int, seconds: float) -> np.ndarray:
    """The first `seconds` of a file's first sound track: float32 [round(seconds * sample_rate)].

    Mixed to mono, resampled to `sample_rate` (Hz), silent after its end. Raises UserError.
    """
    with _reading(path):
        samples = round(seconds * sample_rate)
        if samples * 4 > MAX_OUTPUT_BYTES:
            raise UserError(f"{seconds:g} s at {sample_rate} Hz do not fit in memory, ask for less")
        audio = np.zeros(samples, np.float32)
        with _open(path) as container:
            if not container.streams.audio:
                raise UserError("it has no sound")
            _decode_audio(container, _origin(container.streams.audio[0]), sample_rate, audio)
        return audio


def resample(audio, from_rate: int, to_rate: int) -> np.ndarray:
    """Mono float [N] at from_rate (Hz) -> float32 [N * to_rate // from_rate]."""
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


def read_image(path, size: int | tuple[int, int]) -> np.ndarray:
    """An image file, upright, scaled and cropped by `fit`: uint8 [h, w, 3]. Raises UserError."""
    with _reading(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        _check_pixels(image.width, image.height)  # known before anything is decompressed
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey to white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return fit(np.asarray(image.convert("RGB")), size)
