"""Scenes of Doom, seen and steered by a player: pictures, sound and control. The engine and its levels are a package.

    pip install "vdm_jax[doom]" && apt-get install libopenal1
    python -m vdm_jax.train --config=configs/doom.py --workdir=runs/doom
    python -m vdm_jax.sample --workdir=runs/doom --prompt="the player turns left" --control=left.csv --out=left.mp4

17 frames of 48 x 64 pixels at 8 frames a second, sound at 16,000 Hz. 192 episodes of 16 clips are recorded while the
first stage trains. Four levels are held out.

Not yet run as a whole. It is made for two CPU cores. docs/data.md has figures of the sound after a fifth of its
training.
"""

from configs import common
from vdm_jax.data import doom, doom_captions


def get_config():
    config = common.get_config()
    config.unlock()

    config.data.update(source="doom", size=(48, 64), frames=17, fps=8, sample_rate=16000, text_length=160)
    config.data.control = doom.CONTROL
    config.data.doom.episodes = 192

    vae = config.video_autoencoder
    vae.update(steps=6000, batch_size=8, learning_rate=3e-3)
    vae.model.update(
        channels=(48, 96), space_strides=(1,), time_strides=(2,), blocks=(0, 2), middle_blocks=1, latent_channels=24
    )

    audio = config.audio_autoencoder
    audio.update(steps=6000, batch_size=8, learning_rate=3e-3)
    # Two video frames to a latent frame are 4000 samples: 16 tokens of 250.
    audio.model.update(
        patch=50, channels=(64, 128), strides=(5,), blocks=(1, 2), latent_channels=32, groups=0, overlap=True
    )
    # The waveform keeps the strongest tones, mel bands keep the rest; see docs/data.md.
    audio.update(wave_weight=3.0, stft_weight=0.0, mel_weight=1.0)

    clip = config.clip
    clip.update(steps=1500, batch_size=64)
    clip.hard_negatives.words = (
        ("left", "right"),
        tuple(doom_captions.WEAPONS.values()),
        tuple(doom_captions.MONSTERS.values()),
    )

    denoiser = config.denoiser
    denoiser.update(steps=20000, batch_size=16, cached_clips=3072)
    denoiser.model.update(channels=(64, 128), audio_channels=(32, 64), blocks=(1, 2), embedding=128, text_layers=1)

    config.lock()
    return config
