"""Measures Opus on the windows of sound on which `evaluate` measures the audio autoencoder.

    python -m tests.peers.opus --config=configs/doom.py [--count=64] [--kilobits=12] [--out=opus.json]
    python -m vdm_jax.evaluate --workdir=runs/doom --suite=reconstruction --count=64 --out=report

The first command encodes held-out windows with libopus, decodes them, and prints the metrics of
vdm_jax/metrics/sound.py and the rate of the encoded files, with their headers. The second command prints the same
metrics of the autoencoder.
The sample rate must be one of Opus: 8, 12, 16, 24 or 48 kHz.
"""

import io
import json

import av
import numpy as np
from absl import flags

from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.metrics import sound
from vdm_jax.run import cli, storage

RATES = (8000, 12_000, 16_000, 24_000, 48_000)  # Hz


def through_opus(audio, sample_rate, bits):
    """Returns (a sound float [N] encoded and decoded, bytes of the file). bits: a second. Raises UserError."""
    if sample_rate not in RATES:
        raise UserError(f"data.sample_rate={sample_rate} is none of Opus: use one of {RATES}")
    file = io.BytesIO()
    with av.open(file, "w", format="ogg") as out:
        stream = out.add_stream("libopus", rate=sample_rate, layout="mono")
        stream.bit_rate = bits
        frame = av.AudioFrame.from_ndarray(np.asarray(audio, np.float32)[None], "flt", "mono")
        frame.sample_rate, frame.pts = sample_rate, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    size = file.tell()
    file.seek(0)
    resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
    with av.open(file) as opened:
        frames = [part for frame in opened.decode(audio=0) for part in resampler.resample(frame)]
        frames += resampler.resample(None)
    decoded = np.concatenate([frame.to_ndarray()[0] for frame in frames])[: len(audio)]
    return np.pad(decoded, (0, len(audio) - len(decoded))), size


def measure(audio, fps, sample_rate, bits):
    """Returns {metric: value} of sounds [P, N] that went through Opus, with "kilobits_per_second"."""
    decoded, sizes = zip(*(through_opus(clip, sample_rate, bits) for clip in audio))
    rate = 8 * sum(sizes) / (audio.size / sample_rate) / 1000
    return {"kilobits_per_second": rate, **sound.measure(audio, np.stack(decoded), fps, sample_rate)}


def main(argv):
    options, config = flags.FLAGS, cli.recipe(argv)
    held_out, data = batches.source(config, "held_out"), config.data
    audio = np.stack([held_out[i]["audio"] for i in range(options.count)])
    found = measure(audio, data.fps, data.sample_rate, 1000 * options.kilobits)
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<20} {value:.3f}")
    if options.out:
        storage.replace(options.out, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_integer("count", 64, "Held-out windows.", 1)
    flags.DEFINE_integer("kilobits", 12, "Rate of Opus, in kbit/s.", 6, 510)
    flags.DEFINE_string("out", None, "File for the metrics, as JSON.")
    cli.run(main)
