"""Text to video with sound on published parts: 328 M parameters on the latents of Wan 2.1 and Stable Audio.

Not yet trained.

    python -m vdm_jax.train --config=configs/t2v_wan.py --workdir=gs://BUCKET/run --config.data.path=FOLDER \\
        --config.video_codec.source=WAN/vae --config.text_encoder.source=WAN/text_encoder \\
        --config.audio_codec.source=AUDIO/vae

Parts: the video autoencoder of Wan 2.1, the audio autoencoder of Stable Audio Open, the text encoder UMT5 XXL.
docs/published.md tells where to get them. configs/published has their sizes, which is enough for dry_run.
Clips: 33 frames of the shapes in data.buckets, at 16 frames a second. The audio autoencoder was trained at 44,100 Hz.
Here it gets 40,960 Hz, at which a latent frame has five of its tokens.
"""

from configs import common


def get_config():
    config = common.get_config()
    config.unlock()
    config.compute_dtype = "bfloat16"
    config.checkpoint_every = 1000
    config.mesh.update(data=1, fsdp=-1)
    config.video_codec.source = "configs/published/wan21_vae"
    config.audio_codec.source = "configs/published/oobleck"
    config.text_encoder.source = "configs/published/umt5_xxl"
    config.data.update(source="files", frames=33, size=(256, 448), fps=16, sample_rate=40_960)
    config.data.update(buckets=("33x256x448", "33x448x256", "33x320x320"), text_length=512, threads=16)

    denoiser = config.denoiser
    denoiser.update(steps=200_000, batch_size=64, learning_rate=1e-4, warmup_steps=5000, ema=0.9999, optimizer="adamw")
    denoiser.model.update(
        factorized=False,
        channels=(256, 384, 640),
        blocks=(2, 2, 2),
        attention=(False, False, True),
        cross_modal=(False, False, True),
        time_strides=(2, 2),
        head_dim=128,
        embedding=768,
        groups=32,
    )
    config.lock()
    return config
