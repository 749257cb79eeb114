"""Writes clips: an MP4 file with sound, a WAV file, or numbered PNG files.

PyAV encodes; its wheels carry FFmpeg with libx264 and AAC. A stream of another file may be copied into an MP4 as it is.
"""

import contextlib
import math
import os
import tempfile
import wave
from collections.abc import Callable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation
from etils import epath
from PIL import Image

from vdm_jax.data import media
from vdm_jax.data.rates import rational
from vdm_jax.errors import UserError
from vdm_jax.run import storage

# The fast conversion of swscale darkens a picture by one level of 255. The exact one takes 4 ms a frame of 720p.
TO_YUV = Interpolation.AREA | Interpolation.ACCURATE_RND
# Sound that an MP4 holds, so that players play it. Other sound is written as FLAC, which loses nothing.
COPIED_SOUND = ("aac", "mp3", "alac", "flac", "opus", "ac3", "eac3")


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


def write_mp4(path, video, audio, fps, sample_rate, *, picture_from=None, sound_from=None) -> None:
    """Writes an MP4 file: H.264 (yuv420p) with AAC sound (mono, 48 kHz).

    A small video is enlarged: each pixel is repeated until the short side has at least 256. yuv420p needs even sizes:
    an odd height or width repeats its last row or column. The file appears only when it is complete.

    video: uint8 [F, H, W, 3]; not used with picture_from
    audio: float [N], from the start of frame 0, clipped to [-1, 1]; NaN becomes silence. None: a file without sound
    picture_from: a file whose picture is copied without a change, from its first frame on
    sound_from: a file whose first sound that can be decoded is copied without a change; a sound that MP4 players do not
        play, such as that of a WAV file, becomes FLAC, which has the same samples

    Raises UserError if a file cannot be read or written, ValueError if an array has the wrong type or shape.
    """
    # The muxer sorts all packets by time, with any delay: a player finds the sound of a frame next to the frame.
    options = {"movflags": "+faststart", "max_interleave_delta": "0"}
    with replacing(path) as temporary, contextlib.ExitStack() as opened:
        out = opened.enter_context(av.open(temporary, "w", format="mp4", options=options))
        if picture_from:
            parts = [_copied_picture(opened, out, picture_from)]
        else:
            parts = [_encoded_picture(out, video, fps)]
        if sound_from:
            parts.append(_copied_sound(opened, out, sound_from))
        elif audio is not None and len(audio):
            parts.append(_encoded_sound(out, audio, sample_rate))
        for write in parts:
            write()


def _encoded_picture(out, video, fps) -> Callable[[], None]:
    """Adds a stream to a file, and returns the function that writes it."""
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise ValueError(f"video must be uint8 [F, H, W, 3], not {video.dtype} {video.shape}")
    upscale = math.ceil(256 / min(video.shape[1:3]))
    height, width = (upscale * n for n in video.shape[1:3])
    rate = rational(fps)
    # Without B-frames the first frame has time 0, even in players that ignore edit lists.
    stream = out.add_stream("libx264", rate=rate, options={"crf": "16", "bf": "0"})
    stream.width, stream.height = width + width % 2, height + height % 2
    stream.pix_fmt, stream.time_base = "yuv420p", 1 / rate
    # swscale converts by BT.601 in the limited range. Without these marks a player has to guess.
    stream.codec_context.colorspace = 6  # BT.601
    stream.codec_context.color_range = 1  # limited

    def write():
        for index, image in enumerate(video):
            image = image.repeat(upscale, axis=0).repeat(upscale, axis=1)
            image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame = frame.reformat(format="yuv420p", interpolation=TO_YUV)
            frame.pts, frame.time_base = index, 1 / rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))

    return write


def _encoded_sound(out, audio, sample_rate) -> Callable[[], None]:
    """As `_encoded_picture`, for a sound."""
    audio = _clipped(audio)
    # AAC begins with 1024 extra samples, which some players do not skip, and blurs onsets over its blocks. The extra
    # samples last 21 ms at 48 kHz; at a model's 8 kHz they would last 128 ms.
    stream = out.add_stream("aac", rate=48_000, layout="mono")
    stream.bit_rate = 192_000  # at the default rate, a tone or a click has noise only 20 dB below it

    def write():
        samples = av.AudioFrame.from_ndarray(audio[None], "fltp", "mono")
        samples.sample_rate, samples.pts, samples.time_base = sample_rate, 0, Fraction(1, sample_rate)
        out.mux(stream.encode(samples))
        out.mux(stream.encode(None))

    return write


def _clipped(audio) -> np.ndarray:
    audio = np.nan_to_num(np.asarray(audio, np.float32), posinf=1, neginf=-1).clip(-1, 1)
    if audio.ndim != 1:
        raise ValueError(f"audio must be [N], not {audio.shape}")
    return audio


def _copied_picture(opened, out, path) -> Callable[[], None]:
    """As `_encoded_picture`, for the picture of a file. opened: the contextlib.ExitStack that closes the file."""
    with media.reading(path):
        container = opened.enter_context(media.open_file(path))
        source = media.video_stream(container, path)
    codec = source.codec_context.codec.canonical_name
    if codec not in out.supported_codecs:
        raise UserError(f"an MP4 cannot hold a picture in {codec}: convert {path} to H.264 first")
    stream = out.add_stream_from_template(source, opaque=True)
    return lambda: _copy(out, stream, path, container, source)


def _copied_sound(opened, out, path) -> Callable[[], None]:
    """As `_copied_picture`, for the first sound of a file that can be decoded."""
    with media.reading(path):
        container = opened.enter_context(media.open_file(path))
        source = media.sound_stream(container, path)
    if source.codec_context.codec.canonical_name in COPIED_SOUND:
        stream = out.add_stream_from_template(source, opaque=True)
        return lambda: _copy(out, stream, path, container, source)

    context = source.codec_context
    layout, rate = context.layout, context.rate
    few_bits = context.format.name in ("u8", "u8p", "s16", "s16p")
    stream = out.add_stream("flac", rate=rate, layout=layout)
    stream.codec_context.format = "s16" if few_bits else "s32"

    def write():
        resampler = av.AudioResampler(stream.codec_context.format, layout, rate)
        done = 0  # samples
        for frame in media.decode(path, container, source):
            for part in resampler.resample(frame):
                part.pts, part.time_base = done, Fraction(1, rate)
                done += part.samples
                out.mux(stream.encode(part))
        out.mux([packet for packet in stream.encode(None) if packet.size])  # the last one of FLAC has no content

    return write


def _copy(out, stream, path, container, source) -> None:
    """Writes the packets of a stream of an open file. It begins at 0."""
    for packet in copied_packets(stream, path, container, source):
        out.mux(packet)


def copied_packets(stream, path, container, source) -> Iterator[av.Packet]:
    """Yields the packets of a stream of an open file for a stream that begins at 0."""
    start = media.origin_stamp(source)
    for packet in _timed(_packets(path, container, source)):
        packet.pts = packet.dts if packet.pts is None else packet.pts
        packet.pts, packet.dts = packet.pts - start, packet.dts - start
        packet.stream = stream
        yield packet


def _packets(path, container, source) -> Iterator[av.Packet]:
    with media.reading(path):
        yield from (packet for packet in container.demux(source) if packet.size)


def _timed(packets) -> Iterator[av.Packet]:
    """Yields packets that all have a time of decoding. Matroska leaves it out in the first ones of a stream."""
    waiting = []
    for packet in packets:
        waiting.append(packet)
        if packet.dts is not None:
            for back, early in enumerate(waiting[-2::-1], 1):
                early.dts = packet.dts - back * (packet.duration or 1)
            yield from waiting
            waiting = []
    for packet in waiting:  # no packet has it, so they are in the order of their show
        packet.dts = packet.pts
        yield packet


def write_wav(path, audio, sample_rate) -> None:
    """Writes a sound, float [N] in [-1, 1], as a WAV file of 16 bits. Raises UserError if it cannot be written."""
    samples = np.round(_clipped(audio) * 32767).astype("<i2")
    with storage.writing(path) as file, wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(sample_rate)
        out.writeframes(samples.tobytes())


def write_images(path, video) -> list:
    """Writes each frame of a video, uint8 [F, H, W, 3], as a PNG file, and returns their paths.

    path: "x.png" gives x_00000.png, x_00001.png, ... Raises UserError if one cannot be written.
    """
    path, paths = epath.Path(path), []
    for number, image in enumerate(video):
        paths.append(path.with_name(f"{path.stem}_{number:05d}{path.suffix}"))
        with storage.writing(paths[-1]) as file:
            Image.fromarray(image).save(file, "PNG")
    return paths
