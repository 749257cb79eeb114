"""Sizes that follow from a config, and every check that they fit together. All other code reads the sizes from here."""

import math
from typing import NamedTuple

from vdm_jax import settings
from vdm_jax.data import buckets
from vdm_jax.data.rates import rational
from vdm_jax.errors import UserError
from vdm_jax.settings import STAGES
from vdm_jax.system.networks import make_encoders
from vdm_jax.system.parts import is_finetuned, open_parts

# Settings of a model with one value for each resolution.
PER_RESOLUTION = ("blocks", "attention", "cross_modal", "audio_channels")


class Layout(NamedTuple):
    """Sizes of a clip and of its latents."""

    frames: int  # F, video frames per clip
    samples: int  # N, audio samples per clip
    samples_per_frame: int  # audio samples per video frame
    f_t: int  # video frames per latent frame, except for the first latent frame, which holds 1
    latent_frames: int  # T
    latent_fps: float  # latent frames per second
    video: tuple[int, int, int]  # h, w, C: height, width and channels of a video latent frame
    audio: tuple[int, int] | None  # K, D: sound tokens per latent frame, and their channels; None: no sound
    control: int = 0  # A, buttons of the control of a frame; 0: no control

    @property
    def latent_shapes(self):
        """Shapes of one clip's latents: {'video': (T, h, w, C), 'audio': (K*T, D)}, the latter if there is sound."""
        shapes = {"video": (self.latent_frames, *self.video)}
        if self.audio:
            tokens, channels = self.audio
            shapes["audio"] = (self.latent_frames * tokens, channels)
        return shapes

    def with_frames(self, frames):
        """The Layout of clips of `frames` video frames. Raises UserError unless they are 1 + f_t * n."""
        if frames < 1 or (frames - 1) % self.f_t:
            low = max(0, frames - 1) // self.f_t * self.f_t + 1
            sizes = f"{low} or {low + self.f_t} (1 + {self.f_t} * n)"
            raise UserError(f"{frames} frames do not fill latent frames of {self.f_t}: use {sizes}")
        latent_frames = 1 + (frames - 1) // self.f_t
        return self._replace(frames=frames, samples=frames * self.samples_per_frame, latent_frames=latent_frames)


def layout(config, parts=None):
    """The Layout of a config's clips. Raises UserError for a setting that is not allowed, or that fits no other.

    parts: see parts.open_parts; None opens them.
    """
    settings.check(config.to_dict())
    parts = open_parts(config) if parts is None else parts
    data = config.data
    buckets.parse_all(data.get("buckets", ()))  # older weights have none
    for stage in STAGES:
        _check_lengths(f"{stage}.model", config[stage].model)
    fps = rational(data.fps)
    per_frame = data.sample_rate / fps
    if per_frame.denominator > 1:
        step = fps.numerator
        low = max(1, data.sample_rate // step) * step
        raise UserError(
            f"data.sample_rate={data.sample_rate} has {float(per_frame):g} samples in a frame at data.fps={fps}, and "
            f"not a whole number: use {low} or {low + step}"
        )
    per_frame = int(per_frame)

    encoders = make_encoders(config, parts)
    video, audio = encoders["video_autoencoder"], encoders.get("audio_autoencoder")
    f_t = video.f_t  # video frames per latent frame
    f_s = video.f_s  # pixels per latent, in height and in width
    if any(side % f_s for side in data.size):
        fits = tuple(side // f_s * f_s or f_s for side in data.size)
        raise UserError(f"data.size={data.size} is not a multiple of {f_s}: use {fits}")
    if audio and per_frame * f_t % audio.hop:
        raise UserError(
            f"a latent frame of {per_frame * f_t} samples is no multiple of the {audio.hop} samples of a sound token: "
            f"set data.sample_rate to {_near_rates(data.sample_rate, fps, f_t, audio.hop)} Hz"
            + ("" if "audio_autoencoder" in parts else f", or {_near_hops(per_frame * f_t, audio.hop)}")
        )
    if "clip" not in parts and any(side % config.clip.model.video.patch for side in data.size):
        raise UserError(f"data.size={data.size} is not a multiple of clip.model.video.patch")
    height, width = (side // f_s for side in data.size)
    sound = (per_frame * f_t // audio.hop, audio.latent_channels) if audio else None
    if is_finetuned(config) and data.get("control"):
        raise UserError("a published denoiser has no control: set data.control=()")
    if not is_finetuned(config):
        _check_halvings(config.denoiser.model, (height, width), sound[0])
    sizes = Layout(
        frames=1,
        samples=per_frame,
        samples_per_frame=per_frame,
        f_t=f_t,
        latent_frames=1,
        latent_fps=float(fps / f_t),
        video=(height, width, video.latent_channels),
        audio=sound,
        control=len(data.get("control", ())),  # older weights have none
    ).with_frames(data.frames)
    padded = sizes.latent_frames * f_t * per_frame  # see System.pad_audio
    if audio and "audio_autoencoder" not in parts:
        _check_windows(config.audio_autoencoder, padded, data.sample_rate)
    return sizes


def _near_rates(rate, fps, f_t, hop):
    """Returns the sample rates next to `rate` at which a latent frame has a whole number of sound tokens."""
    # A frame has a whole number of samples, and f_t frames have a whole number of tokens.
    step = fps.numerator * hop // math.gcd(hop, fps.denominator * f_t)
    return f"{rate // step * step} or {rate // step * step + step}" if rate >= step else f"{step}"


def _check_windows(settings, samples, sample_rate):
    """Raises UserError where a window of the audio autoencoder's loss is longer than the padded clip."""
    if max(settings.stft_windows) > samples:
        raise UserError(f"audio_autoencoder.stft_windows go past the {samples} samples of a clip")
    longest = 1000 * samples / sample_rate  # ms
    if settings.get("mel_weight") and max(settings.mel_windows) > longest:
        raise UserError(f"audio_autoencoder.mel_windows go past the {longest:.0f} ms of a clip")


def _near_hops(samples, hop):
    """Returns the samples of a sound token, next to `hop`, that divide a latent frame of `samples` samples."""
    divisors = [n for n in range(1, samples + 1) if samples % n == 0]
    near = [*[n for n in divisors if n < hop][-1:], *[n for n in divisors if n > hop][:1]]
    return f"make audio_autoencoder.model.patch times the product of strides {' or '.join(map(str, near))}"


def _check_lengths(name, model):
    """Raises UserError unless every setting of a model has the right number of values.

    PER_RESOLUTION have one value for each resolution, and the strides one for each pair of neighboring resolutions.
    """
    for key, value in model.items():
        is_stride = key.endswith("strides")
        unset = key == "audio_channels" and not value  # () means the channels of the video stream
        if (is_stride or key in PER_RESOLUTION) and not unset:
            wanted = len(model.channels) - is_stride
            if len(value) != wanted:
                raise UserError(f"{name}.{key}={value} must have {wanted} values for channels={model.channels}")


def _check_halvings(denoiser, sides, tokens):
    """Raises UserError unless the latents can be halved from each resolution of the denoiser to the next.

    sides: height and width of the video latents. tokens: K, sound tokens per latent frame.
    """
    halvings = len(denoiser.channels) - 1
    multiple = denoiser.patch * 2**halvings
    if any(side % multiple for side in sides):
        raise UserError(
            f"the latents have {sides[0]}x{sides[1]} places, but denoiser.model.patch={denoiser.patch} with "
            f"{halvings + 1} resolutions needs a multiple of {multiple}: use a smaller patch, fewer resolutions or "
            "another data.size"
        )
    # A frame of resolution i merges prod(time_strides[:i]) latent frames, and the sound tokens have been halved i
    # times. Each such frame must have a whole number of tokens.
    for i in range(1, halvings + 1):
        if tokens * math.prod(denoiser.time_strides[:i]) % 2**i:
            raise UserError(
                f"{tokens} sound tokens per latent frame do not halve {i} times: use fewer denoiser resolutions "
                "or another audio_autoencoder.model.patch or strides"
            )
