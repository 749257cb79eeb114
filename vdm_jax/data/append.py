"""Writes a film that goes on where a given film ends: the packets of the given film are copied, and new ones follow.

The picture can go on in the same stream where it is H.264 of 8 bits: the new frames have parameter sets of their own,
with another number than those of the given film, so that a player may jump between both parts. Sound can go on so where
it is AAC (LC). Other sound is decoded to 48 kHz mono, and encoded with the new sound.
"""

import contextlib
import itertools
import logging
import os
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from vdm_jax.data import media, writing
from vdm_jax.data.rates import rational

logger = logging.getLogger("vdm_jax")

OWN_SET = "sps-id=31"  # cameras and x264 number their parameter sets from 0
AAC_BLOCK = 1024  # samples of a packet; the first packet of an encoder holds only what precedes the sound
RATE = 48_000  # Hz, of sound that is encoded anew


def fault(path) -> str | None:
    """Returns why the picture of a film cannot go on in its own stream, or None if it can. Raises UserError."""
    with media.reading(path), media.open_file(path) as container:
        codec = media.video_stream(container, path).codec_context
        if codec.name != "h264" or codec.pix_fmt not in ("yuv420p", "yuvj420p"):
            return f"it is {codec.name} in {codec.pix_fmt}, and not H.264 in yuv420p"
        return None if (codec.extradata or b"")[:1] == b"\1" else "it is in no MP4, MOV or MKV"


def write_mp4(path, start, video, audio, fps, sample_rate) -> None:
    """Writes an MP4 file that begins with the packets of a film and goes on with new frames and their sound.

    The new frames have the size of the film, and are black where a model of another shape has seen nothing.

    start: the film, of which `fault` is None
    video: uint8 [F, h, w, 3], the new frames
    audio: float32 [N] in [-1, 1], their sound
    Raises UserError if a file cannot be read or written.
    """
    seconds = Fraction(media.probe(start)["duration"]).limit_denominator(90_000)
    # The muxer sorts all packets by time, with any delay. The parameter sets of the new frames stand among them.
    options = {"movflags": "+faststart", "max_interleave_delta": "0"}
    with writing.replacing(path) as temporary, contextlib.ExitStack() as opened:
        out = opened.enter_context(av.open(temporary, "w", format="mp4", options=options))
        with media.reading(start):
            container, other = (opened.enter_context(media.open_file(start)) for _ in range(2))
            source, frame = media.video_stream(container, start), _first_frame(start)
            track = media.sound_stream(other, start) if media.probe(start)["has_audio"] else None
        stream = out.add_stream_from_template(source, opaque=True)
        if track is not None and track.codec_context.name == "aac" and track.codec_context.profile == "LC":
            sound = _longer_aac(out, start, other, track, seconds, audio, sample_rate)
        else:
            sound = _encoded_anew(out, start, track, seconds, audio, sample_rate)
        old = writing.copied_packets(stream, start, container, source)
        for packet in itertools.chain(
            sound, _longer_picture(old, stream, source, frame, seconds, video, rational(fps))
        ):
            out.mux(packet)


def _first_frame(path):
    """Returns the first frame of a film, as it is coded."""
    with media.open_file(path) as container:
        return next(media.decode(path, container, media.video_stream(container, path)))


def _longer_picture(old, stream, source, frame, seconds, video, rate):
    """Yields the packets of a film, and then those of new frames, for a stream.

    old: packets of the film
    frame: its first frame
    seconds: how long it lasts
    """
    yield from old
    base = source.time_base
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, frame.format.name
    encoder.time_base, encoder.framerate = 1 / rate, rate
    encoder.colorspace, encoder.color_range = int(frame.colorspace), int(frame.color_range)
    encoder.options = {"crf": "16", "bf": "0", "x264-params": OWN_SET}
    guessed = media.matrix_of(frame)
    form = dict(
        format=frame.format.name,
        dst_colorspace=frame.colorspace if guessed is None else guessed,
        dst_color_range=frame.color_range,
        interpolation=writing.TO_YUV,
    )

    def images():
        for index, image in enumerate(video):
            shown = _as_coded(image, frame, float(source.sample_aspect_ratio or 1))
            new = av.VideoFrame.from_ndarray(np.ascontiguousarray(shown), format="rgb24").reformat(**form)
            new.pts, new.time_base = index, 1 / rate
            yield new
        yield None

    for coded in itertools.chain.from_iterable(encoder.encode(image) for image in images()):
        packet = av.Packet(_with_lengths(bytes(coded)))
        packet.time_base, packet.stream, packet.is_keyframe = base, stream, coded.is_keyframe
        packet.pts = packet.dts = round((seconds + coded.pts / rate) / base)
        packet.duration = round(1 / rate / base)
        yield packet


def _with_lengths(data: bytes) -> bytes:
    """Returns H.264 data whose units begin with their length, as in MP4, in place of start codes."""
    units = data.replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
    return b"".join(len(unit).to_bytes(4, "big") + unit for unit in units)


def _as_coded(image, frame, pixel_aspect: float):
    """Returns an image uint8 [h, w, 3] as the pixels of a frame that is shown turned: media.read_video, backwards."""
    turned, down, right = media.orientation(frame)
    height, width = (frame.width, frame.height) if turned else (frame.height, frame.width)
    aspect = 1 / pixel_aspect if turned else pixel_aspect
    ratio = min(height / image.shape[0], width * aspect / image.shape[1])  # pixels of the film for one of the image
    shape = round(image.shape[0] * ratio), round(image.shape[1] * ratio / aspect)
    kind = Image.Resampling.NEAREST if ratio == int(ratio) and aspect == 1 else Image.Resampling.BICUBIC
    shown = np.zeros((height, width, 3), np.uint8)
    top, left = (height - shape[0]) // 2, (width - shape[1]) // 2
    scaled = Image.fromarray(image).resize(shape[::-1], kind)
    shown[top : top + shape[0], left : left + shape[1]] = np.asarray(scaled)
    shown = shown[::down, ::right]
    return shown.swapaxes(0, 1) if turned else shown


def _encoded_anew(out, path, track, seconds, audio, sample_rate):
    """Adds a sound to a file: that of a film, decoded, or silence, and then new sound. Returns its packets."""
    before = np.zeros(round(seconds * RATE), np.float32)
    if track is not None:
        codec = track.codec_context.name
        logger.warning("the %s sound of %s is encoded anew, mono at %d Hz", codec, os.path.basename(path), RATE)
        before = media.read_audio(path, RATE, float(seconds))
    samples = np.concatenate([before, media.resample(audio, sample_rate, RATE)])
    stream = out.add_stream("aac", rate=RATE, layout="mono")
    stream.bit_rate = 192_000
    return _aac_packets(stream, samples[None], RATE, "mono")


def _aac_packets(encoder, samples, rate, layout):
    """Yields the packets of an encoder for samples float32 [channels, N]."""
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
    frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
    yield from encoder.encode(frame)
    yield from encoder.encode(None)


def _longer_aac(out, path, container, source, seconds, audio, sample_rate):
    """Adds a sound of AAC (LC) to a file, and new sound behind it in the same stream. Returns its packets."""
    stream = out.add_stream_from_template(source, opaque=True)
    rate, base, layout = source.codec_context.sample_rate, source.time_base, source.codec_context.layout

    def packets():
        end = 0  # of the last packet
        for packet in writing.copied_packets(stream, path, container, source):
            if packet.pts * base >= seconds:  # sound behind the end of the picture
                break
            end = packet.pts + round(Fraction(AAC_BLOCK, rate) / base)
            yield packet
        silence = round((seconds - end * base) * rate)  # samples, up to the end of the picture
        new = np.pad(media.resample(audio, sample_rate, rate), (max(0, silence), 0))[max(0, -silence) :]
        encoder = av.CodecContext.create("aac", "w")
        encoder.sample_rate, encoder.layout, encoder.format = rate, layout.name, "fltp"
        encoder.bit_rate, encoder.time_base = 192_000, Fraction(1, rate)
        made = _aac_packets(encoder, np.tile(new, (layout.nb_channels, 1)), rate, layout.name)
        for coded in itertools.islice(made, 1, None):
            packet = av.Packet(bytes(coded))
            packet.time_base, packet.stream, packet.is_keyframe = base, stream, True
            packet.pts = packet.dts = end + round(Fraction(coded.pts, rate) / base)
            packet.duration = round(Fraction(AAC_BLOCK, rate) / base)
            yield packet

    return packets()
