"""The boards that show a run: TensorBoard, and by config Weights & Biases. Both get the same numbers and files.

A file is a picture (.png), a clip (.mp4) or a sound (.wav). TensorBoard plays no MP4, so it gets a clip as an animated
GIF, and its sound as a WAV.
"""

import io
import os
import time
import wave

import av
import numpy as np
from PIL import Image
from tensorboardX import event_file_writer, summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from vdm_jax.errors import UserError

GIF_FPS = 8.0  # of a clip that does not tell its frame rate


class TensorBoard:
    """An event file in a folder."""

    def __init__(self, directory, step):
        self.events = event_file_writer.EventsWriter(os.path.join(directory, "events"))
        if step:  # makes TensorBoard drop the points of later steps
            self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, step, **what):
        self.events.write_event(Event(wall_time=time.time(), step=step, **what))

    def write(self, step, values):
        """values: {tag: number}"""
        for tag, value in values.items():
            self._add(step, summary=summary.scalar(tag, value))

    def write_files(self, step, files):
        """files: {tag: path}"""
        for tag, path in files.items():
            content = path.read_bytes()
            if path.suffix == ".png":
                width, height = Image.open(io.BytesIO(content)).size
                values = [Summary.Value(tag=tag, image=_image(height, width, content))]
            elif path.suffix == ".wav":
                values = [Summary.Value(tag=tag, audio=_audio(content))]
            else:
                values = [Summary.Value(tag=tag, image=_image(*_as_gif(content)))]
                sound = _as_wav(content)
                values += [Summary.Value(tag=f"{tag}/sound", audio=_audio(sound))] if sound else []
            self._add(step, summary=Summary(value=values))

    def flush(self):
        self.events.flush()

    def close(self):
        self.events.close()


class Wandb:
    """A run of Weights & Biases: kept in a folder with mode "offline", sent with "online".

    A run that resumes goes on under the same id, with a folder of its own. Raises UserError where the package is
    missing or refuses.

    id, name: of the run
    config: the settings of the run, as a dict
    """

    def __init__(self, directory, *, project, mode, id, name, config):
        self.wandb = package()
        quiet = self.wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True, x_disable_meta=True
        )
        place = dict(project=project, mode=mode, id=id, name=name, dir=os.fspath(directory))
        if mode == "online":
            place["resume"] = "allow"
        try:
            self.run = self.wandb.init(**place, config=config, settings=quiet, reinit="create_new")
        except self.wandb.errors.Error as error:
            raise UserError(
                f"Weights & Biases refuses ({' '.join(str(error).split())}): set wandb.mode=offline"
            ) from None
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step, values):
        """values: {tag: number}"""
        self.run.log({"step": step, **values})

    def write_files(self, step, files):
        """files: {tag: path}"""
        kinds = {
            ".png": self.wandb.Image,
            ".wav": self.wandb.Audio,
            ".mp4": lambda path: self.wandb.Video(path, format="mp4"),
        }
        self.run.log({"step": step, **{tag: kinds[path.suffix](os.fspath(path)) for tag, path in files.items()}})

    def flush(self):
        """Does nothing: Weights & Biases writes at once."""

    def close(self):
        self.run.finish()


def package():
    """Returns the module wandb. Raises UserError where it is not installed."""
    try:
        import wandb
    except ImportError:
        raise UserError("wandb.project needs a package: pip install 'vdm_jax[wandb]', or leave it empty") from None
    return wandb


def _image(height, width, content):
    return Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)


def _audio(content):
    """content: the bytes of a WAV file of one channel."""
    with wave.open(io.BytesIO(content)) as file:
        rate, frames = file.getframerate(), file.getnframes()
    return Summary.Audio(
        sample_rate=rate, num_channels=1, length_frames=frames, encoded_audio_string=content, content_type="audio/wav"
    )


def _as_gif(content):
    """Returns (height, width, bytes of an animated GIF) of the bytes of an MP4 file."""
    with av.open(io.BytesIO(content)) as container:
        rate = float(container.streams.video[0].average_rate or GIF_FPS)
        frames = [frame.to_image() for frame in container.decode(video=0)]
    out = io.BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=1000 / rate, loop=0)
    return frames[0].height, frames[0].width, out.getvalue()


def _as_wav(content):
    """Returns the bytes of a WAV file with the sound of the bytes of an MP4 file; b"" for a silent one."""
    with av.open(io.BytesIO(content)) as container:
        if not container.streams.audio:
            return b""
        stream = container.streams.audio[0]
        resampler = av.AudioResampler("s16", "mono", stream.rate)
        frames = [part for frame in container.decode(audio=0) for part in resampler.resample(frame)]
        sound = np.concatenate([frame.to_ndarray()[0] for frame in frames + resampler.resample(None)])
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(stream.rate)
        file.writeframes(sound.astype("<i2").tobytes())
    return out.getvalue()
