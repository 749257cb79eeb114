"""Reads videos with their sound, sound files and images. A path may also be a `Part`.

PyAV decodes; its wheels carry FFmpeg. Pillow reads images. A video is uint8
[F, H, W, 3], a sound is mono float32 [N] in [-1, 1], a size is h = w or (h, w) in pixels, and rates are in Hz. A file
that cannot be read raises a UserError of one line that names the file. A damaged packet costs no more than its own
frames, and damaged sound never costs the picture: a warning names the file once.
"""

import contextlib
import itertools
import logging
import math
import os
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from vdm_jax.data import color, shards
from vdm_jax.data.rates import rational
from vdm_jax.data.shards import Part
from vdm_jax.errors import UserError

logger = logging.getLogger("vdm_jax")

# The formats that FFmpeg may open. A playlist, for example, would make it open other files or URLs.
CONTAINERS = (
    "mov,matroska,avi,mpegts,mpeg,flv,gif,apng,ogg,asf,mxf,nut,rm,ivf,dv,wtv,yuv4mpegpipe,mjpeg,mpegvideo,m4v,h264,"
    "hevc,obu,wav,w64,mp3,flac,aac,ac3,eac3,aiff,caf,au,amr,ape,wv,tta"
)
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis")  # FFmpeg would read one tile of such an image
MAX_FILE_BYTES = 4 << 30
MAX_SOURCE_FRAMES = 50_000  # decoded by one call
MAX_PIXELS = 64_000_000  # of one frame or image
MAX_OUTPUT_BYTES = 1 << 30  # of one decoded clip
# WebM counts time in steps of 1 ms: a frame that is due at 1/24 s = 0.0417 s has the time stamp 0.042 s.
TIME_TOLERANCE = Fraction(1001, 1_000_000)  # s
# The fast conversion of swscale darkens a picture by one level of 255 and blurs color over edges. The exact one takes
# 4 ms a frame of 720p.
TO_RGB = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


def _name(path) -> str:
    """Returns the name of a file, or of a part of one, for messages."""
    return path.name if isinstance(path, Part) else os.path.basename(os.fspath(path)) or os.fspath(path)


@contextlib.contextmanager
def reading(path) -> Iterator[None]:
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
        raise UserError(f"cannot read {_name(path)!r}: {reason or type(error).__name__}") from error


def open_file(path):
    """Returns a file as an open container of PyAV."""
    # With "file:", a colon in a name is not taken for a protocol. Tags that are not UTF-8 are no error.
    options = {"format_whitelist": CONTAINERS}
    source = shards.open_file(path) if isinstance(path, Part) else "file:" + os.fspath(path)
    return av.open(source, options=options, metadata_errors="replace")


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(f"{width}x{height} is over the limit of {MAX_PIXELS} pixels")


_told = set()  # (file, "picture" or "sound") of the warnings: a file is read many times, and named once


def _tell_once(path, part: str, fault: str) -> None:
    if (path, part) not in _told:
        _told.add((path, part))
        logger.warning("%r: its %s %s", _name(path), part, fault)


def decode(path, container, stream) -> Iterator[av.VideoFrame | av.AudioFrame]:
    """Yields the frames of a stream, from where the container stands. Leaves out damaged packets and says so once."""
    packets, damaged = container.demux(stream), 0
    part = {"video": "picture", "audio": "sound"}[stream.type]
    try:
        while damaged <= MAX_SOURCE_FRAMES:
            try:
                packet = next(packets, None)
                frames = [] if packet is None else packet.decode()
            except Exception:  # InvalidDataError, ValueError, ...: of this packet, or of the container, which ends then
                damaged += 1
                continue
            yield from frames
            if packet is None:
                break
    finally:
        if damaged:
            _tell_once(path, part, f"has damaged packets, which are left out: {damaged} so far")


def _first_that_decodes(path, streams, frames: int):
    """Returns the index of the first of some streams of which `frames` frames can be decoded, or None."""
    for index in [stream.index for stream in streams if stream.codec_context is not None]:
        with open_file(path) as container:
            decoded = decode(path, container, container.streams[index])
            if len(list(itertools.islice(decoded, frames))) == frames:
                return index
    return None


def _pictures(container) -> list:
    """Returns the video streams that are no cover pictures."""
    return [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]


def video_stream(container, path):
    """Returns the first video stream that moves, or the first one of a file without motion."""
    streams = _pictures(container)
    if not streams:
        raise UserError("it has no video stream")
    known = [stream for stream in streams if stream.codec_context is not None]
    if not known:
        raise UserError("its video codec is unknown")
    for stream in known:
        _check_pixels(stream.codec_context.width, stream.codec_context.height)
    index = _first_that_decodes(path, known, 2) if len(known) > 1 else None
    return known[0] if index is None else container.streams[index]


def origin_stamp(stream) -> int:
    """Returns the time stamp at which a stream begins. Opus has samples before 0 that are not heard."""
    start = stream.start_time or 0
    return max(start, 0) if stream.type == "audio" else start


def _origin(stream) -> Fraction:
    """Returns the time at which a stream begins, in s."""
    return Fraction(origin_stamp(stream)) * (stream.time_base or 0)


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
    if (height, width, pixel_aspect) == (full_h, full_w, 1):
        return image.copy()  # it may be the buffer of an engine
    ratio = min(full_h / height, full_w * pixel_aspect / width)  # source pixels per target pixel
    crop_h, crop_w = min(height * ratio, full_h), min(width * ratio / pixel_aspect, full_w)
    top, left = (full_h - crop_h) / 2, (full_w - crop_w) / 2
    # Where the ratio is a whole number the average of the pixels is exact, and undoes the upscaling of write_mp4.
    exact = ratio == int(ratio) and pixel_aspect == 1
    kind = Image.Resampling.BOX if exact else Image.Resampling.LANCZOS
    image = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(image.resize((width, height), kind, (left, top, left + crop_w, top + crop_h)))


def _holds_image(path) -> bool:
    """Returns whether a file is an image that Pillow reads, and no animation that FFmpeg reads."""
    with shards.open_file(path) as file:
        head = file.read(12)
        if head[4:8] == b"ftyp" and head[8:] in HEIC_BRANDS:
            return True
        try:
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                return not (image.format in ("GIF", "PNG", "AVIF") and image.is_animated)
        except Exception:  # UnidentifiedImageError, SyntaxError, struct.error, ...
            return False


def kind(path) -> str | None:
    """Returns what a file is by its content: "video", "image", "sound only" or None. It reads the beginning alone."""
    try:
        with reading(path):
            if _holds_image(path):
                return "image"
            with open_file(path) as container:
                return "video" if _pictures(container) else "sound only" if container.streams.audio else None
    except UserError:
        return None


def probe(path) -> dict:
    """Returns {'duration': s from the first frame on, 'has_audio': bool, 'size': (h, w), 'fps'} of a video or an image.

    The size is in pixels, as the first frame is shown: turned upright, and as wide as square pixels would be. The
    duration is that of the picture, to the end of its last packet. Sound that cannot be decoded is no sound. An image
    has a duration and an fps of 0. Raises UserError if no frame can be decoded.
    """
    with reading(path):
        if _holds_image(path):
            return {"duration": 0.0, "has_audio": False, "size": _image(path).shape[:2], "fps": 0.0}
        with open_file(path) as container:
            stream = video_stream(container, path)
            frame = next(decode(path, container, stream), None)
            if frame is None:
                raise UserError("none of its frames can be decoded")
            size = frame.height, round(frame.width * float(stream.sample_aspect_ratio or 1))
            size = size[::-1] if orientation(frame)[0] else size
            has_audio = _first_that_decodes(path, container.streams.audio, 1) is not None
            duration = _length(path, stream.index, container.duration or 0)
            fps = float(1 / _step(stream))
            return {"duration": float(duration), "has_audio": has_audio, "size": size, "fps": fps}


def _length(path, index: int, stated: int) -> Fraction:
    """Returns the time in s from a stream's first time stamp to the end of its last packet.

    Headers often state the length of the longest stream, or what the file had before it was cut off. The packets from
    the key frame before the stated end on tell the real end. If there are none, all packets are read.

    stated: the length that the header states, in microseconds
    """
    for start in (stated, 0):
        with open_file(path) as container:
            stream = container.streams[index]
            end = origin = _origin(stream)
            step = _step(stream) if stream.type == "video" else 0  # of a packet that does not tell how long it lasts
            with contextlib.suppress(av.FFmpegError):  # of a damaged end
                if start:
                    container.seek(int(Fraction(start, av.time_base) / stream.time_base), stream=stream)
                for packet in itertools.islice(container.demux(stream), 20 * MAX_SOURCE_FRAMES):
                    stamp = packet.dts if packet.pts is None else packet.pts
                    lasts = packet.duration * stream.time_base if packet.duration else step
                    if stamp is not None and not packet.is_discard:
                        end = max(end, stamp * stream.time_base + lasts)
                    elif stamp is None and packet.size and not start:  # a bare stream has no time stamps
                        end += step
            if end > origin:
                break
    return end - origin or Fraction(1, 25)


def orientation(frame) -> tuple[bool, int, int]:
    """Returns how a frame is shown upright: whether x and y are exchanged, and the steps +1 or -1 in y and in x.

    Cameras store a display matrix beside the frames: the pixel (x, y) is shown at (a x + c y, b x + d y).
    """
    try:
        a, b, _, c, d = np.frombuffer(frame.side_data["DISPLAYMATRIX"], np.int32)[:5].astype(float)
    except (KeyError, ValueError):  # no matrix, or beside data of a kind that PyAV does not know: then the angle alone
        angle = math.radians(frame.rotation)  # counterclockwise
        a, b, c, d = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    turned = abs(b) + abs(c) > abs(a) + abs(d)
    down, right = (b, c) if turned else (d, a)
    return turned, 1 if down >= 0 else -1, 1 if right >= 0 else -1


def matrix_of(frame):
    """Returns the matrix from Y'CbCr to RGB of a frame that names none, or None.

    As in players: BT.2020 for HDR, BT.709 for high definition, else BT.601.
    """
    if frame.colorspace in (1, 4, 5, 6, 7, 9) or frame.format.is_rgb:
        return None
    if frame.colorspace == 10 or frame.color_trc in (color.PQ, color.HLG):  # 10: BT.2020 with constant luminance
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601


def _picture(frame, size, pixel_aspect: float, scaler: VideoReformatter) -> np.ndarray:
    """Returns a frame as `fit` gives it, upright and in SDR: uint8 [h, w, 3]. swscale scales it before it is RGB."""
    turned, down, right = orientation(frame)
    height, width = pair(size)[::-1] if turned else pair(size)
    ratio = max(height / frame.height, width / (frame.width * pixel_aspect))  # target pixels per source pixel
    # The whole frame at the target's scale, with an even number of pixels to crop in each direction
    full_h = height + 2 * round((frame.height * ratio - height) / 2)
    full_w = width + 2 * round((frame.width * pixel_aspect * ratio - width) / 2)
    has_alpha = any(part.is_alpha for part in frame.format.components)
    sdr = color.is_sdr(frame.color_primaries, frame.color_trc)

    def convert(h, w):
        same = (h, w) == (frame.height, frame.width)
        # As in `fit`, an average undoes the upscaling of write_mp4.
        method = Interpolation.POINT if same else Interpolation.AREA if 1 / ratio % 1 == 0 else Interpolation.LANCZOS
        format = ("rgba" if has_alpha else "rgb24") if sdr else "rgb48le"
        matrix = matrix_of(frame)
        image = scaler.reformat(frame, w, h, format, matrix, matrix, method | TO_RGB, threads=1).to_ndarray()
        if not sdr:
            parts = np.array_split(image, 1 + image.size // 3_000_000)  # each needs 20 times its memory
            return np.concatenate([color.to_sdr(p / 65535, frame.color_primaries, frame.color_trc) for p in parts])
        return _over_white(Image.fromarray(image)) if has_alpha else image

    if has_alpha or full_h * full_w > MAX_PIXELS:
        image = fit(convert(frame.height, frame.width), (height, width), pixel_aspect)
    else:
        top, left = (full_h - height) // 2, (full_w - width) // 2
        image = convert(full_h, full_w)[top : top + height, left : left + width]
    image = image.swapaxes(0, 1) if turned else image
    return image[::down, ::right].copy()  # without the pixels that are cropped


def _shown_frames(path, container, stream, start: Fraction) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Yields (frame, end of its show in s from the stream's start), from `start` or an earlier frame on."""

    def decode_from(at):
        if start > 0:
            with contextlib.suppress(av.FFmpegError):  # some formats can only be read from their start
                container.seek(int((at + _origin(stream)) / stream.time_base), stream=stream)
        time = -_step(stream)
        for frame in decode(path, container, stream):
            stamp = frame.dts if frame.pts is None else frame.pts
            time = time + _step(stream) if stamp is None else stamp * stream.time_base - _origin(stream)
            yield time, frame

    frames = decode_from(start)
    first = next(frames, None)
    if start > 0 and (first is None or first[0] > start + TIME_TOLERANCE):  # the file's index is wrong
        frames = decode_from(0)
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
    a variable frame rate is read correctly. Each frame is turned and mirrored as its display matrix says, scaled until
    it covers the size, and cropped around its center. HDR becomes SDR. The sound is mixed to mono and begins with the
    picture. An image is a video of one frame, in silence.

    start: of the clip, in s
    frames: F; after the end of the file the last frame is repeated, in silence. None reads to the end.

    Raises UserError if the file cannot be read, ends before `start` or is over a limit.
    """
    height, width = pair(size)
    rate = rational(fps)
    begin = Fraction(start).limit_denominator(1_000_000_000)
    max_frames = MAX_OUTPUT_BYTES // (height * width * 3)
    too_long = f"it gives over {max_frames} frames of {height}x{width} at {float(rate):g} fps, ask for fewer"
    images = []
    with reading(path):
        if (frames or 0) > max_frames:
            raise UserError(too_long)
        if _holds_image(path):
            images = [fit(_image(path), size)] * (frames or 1)
            return np.stack(images), np.zeros(int(len(images) * sample_rate / rate), np.float32)
        with open_file(path) as container:
            stream = video_stream(container, path)
            origin, scaler, has_sound = _origin(stream), VideoReformatter(), bool(container.streams.audio)
            for frame, end in _shown_frames(path, container, stream, begin):
                due = math.ceil((end - TIME_TOLERANCE - begin) * rate)  # frames of the clip that begin before `end`
                due = due if frames is None else min(due, frames)
                if due > max_frames:
                    raise UserError(too_long)
                if due > len(images):
                    image = _picture(frame, size, float(stream.sample_aspect_ratio or 1), scaler)
                    images += [image] * (due - len(images))
                if due == frames:
                    break
        if not images:
            raise UserError(f"it ends at {float(end):g} s, before the start of the clip at {start:g} s")
        if frames is not None:
            images += images[-1:] * (frames - len(images))
        audio = np.zeros(int(len(images) * sample_rate / rate), np.float32)
        if not has_sound:
            return np.stack(images), audio
        # The file is opened again: a seek for the sound would move the picture, too.
        with open_file(path) as container:
            try:
                track = _first_that_decodes(path, container.streams.audio, 1)
                if track is not None:
                    _decode_audio(path, container, container.streams[track], origin + begin, sample_rate, audio)
            except Exception as error:  # a fault of the sound alone
                _tell_once(path, "sound", f"cannot be read to its end: {error}")
    return np.stack(images), audio


def _mono(frames, sample_rate: int) -> Iterator[av.AudioFrame]:
    """Yields the sound of some frames as 16-bit mono. With 16 bits, swresample scales a mix below full scale."""
    resampler = last = None
    for frame in frames:
        form = frame.format.name, frame.layout.name, frame.sample_rate
        if form != last:  # tracks of broadcasts change from stereo to 5.1 and back
            yield from resampler.resample(None) if last else ()
            resampler, last = av.AudioResampler(format="s16", layout="mono", rate=sample_rate), form
        yield from resampler.resample(frame)
    yield from resampler.resample(None) if last else ()


def _decode_audio(path, container, stream, begin: Fraction, sample_rate: int, audio: np.ndarray) -> None:
    """Fills `audio` float32 [N] with the sound from `begin` on (s on the file's clock)."""
    if begin > _origin(stream):  # a quarter of a second early, as the first samples after a seek are inexact
        early = max(_origin(stream), begin - Fraction(1, 4))
        with contextlib.suppress(av.FFmpegError):  # some formats can only be read from their start
            container.seek(int(early / stream.time_base), stream=stream)
    position = None  # of the next chunk, in samples
    for chunk in _mono(decode(path, container, stream), sample_rate):
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
        if position >= len(audio):
            return


def sound_stream(container, path):
    """Returns the first sound track of a file that can be decoded. Raises UserError if there is none."""
    if not container.streams.audio:
        raise UserError("it has no sound")
    track = _first_that_decodes(path, container.streams.audio, 1)
    if track is None:
        raise UserError("its sound cannot be decoded")
    return container.streams[track]


def sound_seconds(path) -> float:
    """Returns how long a file's first sound track lasts that can be decoded. Raises UserError as `read_audio`."""
    with reading(path), open_file(path) as container:
        return float(_length(path, sound_stream(container, path).index, container.duration or 0))


def read_audio(path, sample_rate: int, seconds: float) -> np.ndarray:
    """Returns the beginning of a file's first sound track that can be decoded: mono, float32 [seconds * sample_rate].

    It is silent after the end of the track. Raises UserError if the file cannot be read or has no such track.
    """
    with reading(path), open_file(path) as container:
        stream = sound_stream(container, path)
        audio = np.zeros(round(seconds * sample_rate), np.float32)
        _decode_audio(path, container, stream, _origin(stream), sample_rate, audio)
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


def _over_white(image: Image.Image) -> np.ndarray:
    """Returns an image as RGB, uint8 [H, W, 3]. White shines through where the image is transparent."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _image(path) -> np.ndarray:
    """Returns an image, turned upright, uint8 [H, W, 3]."""
    with shards.open_file(path) as file:
        if file.read(12)[8:] in HEIC_BRANDS:
            raise UserError("it is a HEIC image, which Pillow cannot read: convert it to JPEG or PNG")
        image = Image.open(file, formats=IMAGE_FORMATS)
        _check_pixels(image.width, image.height)  # before any pixel is decompressed
        image = ImageOps.exif_transpose(image)
        # Pillow would clip these modes: 16 bits of gray, and floating point, where 1 is white.
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        elif image.mode == "F":
            image = Image.fromarray(np.rint(255 * np.nan_to_num(np.asarray(image)).clip(0, 1)).astype(np.uint8))
        return _over_white(image)


def read_image(path, size=None) -> np.ndarray:
    """Returns an image, turned upright, uint8 [h, w, 3], scaled and cropped by `fit` to a size. Raises UserError.

    What is transparent becomes white. Of an animation it is the first frame.
    """
    with reading(path):
        image = _image(path)
        return image if size is None else fit(image, size)
