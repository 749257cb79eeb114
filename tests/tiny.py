"""The smallest recipe that passes through every line: what the tests train. Its result is noise.

    python -m vdm_jax.train --config=tests/tiny.py --workdir=DIR
    python -m vdm_jax.train --config=tests/tiny.py:hard_negatives --workdir=DIR
    python -m vdm_jax.train --config=tests/tiny.py:phases --workdir=DIR
    python -m vdm_jax.train --config=tests/tiny.py:student --workdir=DIR
    python -m vdm_jax.train --config=tests/tiny.py:small --workdir=DIR
    python -m vdm_jax.train --config=tests/tiny.py:doom --workdir=DIR
    python -m vdm_jax.train --config=tests/tiny.py:memory --workdir=DIR

In the second the denoiser has hard negatives, too. In the third it has two phases. In the fourth it is a student. In
the third, the fifth and the seventh it has one resolution and compiles faster, for tests of what happens around it. The
sixth is of Doom, with control. The seventh has a memory.
"""

from configs import common
from vdm_jax.data import captions, doom


def get_config(more=None):
    config = common.get_config()
    config.unlock()
    config.update(checkpoint_every=4, log_every=1)
    config.validation.clips = 4

    data = config.data
    data.update(frames=5, size=(16, 24), sample_rate=2000, text_length=96)  # 250 samples a frame; f_t = 2, so T = 3
    data.world = dict(objects=(1.0,), gravity=0.0, occluder=0.0, leave=0.0, pan=0.0, light=0.0)

    if more == "doom":
        data.update(source="doom", control=doom.CONTROL)
        data.doom.episodes = 1

    tiny = dict(optimizer="adamw", steps=8, batch_size=4, warmup_steps=2)  # adamw compiles faster
    vae = config.video_autoencoder
    vae.update(tiny)
    vae.model.update(
        channels=(16, 16), space_strides=(1,), time_strides=(2,), blocks=(0, 1), middle_blocks=0, latent_channels=4
    )

    audio = config.audio_autoencoder
    audio.update(tiny)
    audio.stft_windows = (64, 256)
    # K = 4. Groups of many channels: normalising the two of a group, on each sample, would leave their signs.
    audio.model.update(patch=25, channels=(16, 16), strides=(5,), blocks=(0, 1), latent_channels=4, groups=2)

    clip = config.clip
    clip.update(tiny)
    clip.model.text.update(width=16, layers=1, heads=2)
    clip.model.video.update(channels=(8, 16))
    clip.model.embedding = 16
    clip.hard_negatives.words = (captions.COLORS, captions.SHAPES, captions.DIRECTIONS)

    denoiser = config.denoiser
    denoiser.update(tiny)
    denoiser.update(cached_clips=32, statistics_clips=32)
    denoiser.hard_negatives.words = (captions.DIRECTIONS,) if more == "hard_negatives" else ()
    denoiser.hard_negatives.every = 1
    if more == "phases":
        denoiser.phases = (
            {"share": 0.5, "data.frames": 3, "denoiser.batch_size": 2},
            {
                "share": 0.5,
                "denoiser.learning_rate": 1e-3,
                "denoiser.diffusion.patterns": {"text": 0.8, "continue": 0.2},
            },
        )
    if more == "student":
        denoiser.distillation.update(teacher="reference", steps=(2, 4, 8), teacher_share=0.5)
        denoiser.model.student = True
        config.sample.update(method="ddim")
        config.sample.guidance.text = 1.0
    # Time halves once, so T = 3 is odd there.
    denoiser.model.update(
        channels=(16, 16), blocks=(1, 0), attention=(False, False), cross_modal=(False, False), time_strides=(2,)
    )
    denoiser.model.update(head_dim=8, embedding=16)
    if more == "memory":
        denoiser.model.update(memory=3, memory_width=8)
        denoiser.memory.update(windows=3, cuts=0.5)
        denoiser.update(cached_clips=0)
    if more in ("phases", "small", "memory"):
        denoiser.model.update(channels=(16,), blocks=(0,), attention=(False,), cross_modal=(False,), time_strides=())

    config.sample.update(steps=4, context_frames=2)
    config.evaluate.update(clips=4, prompts=2, batch_size=2, copies=64)
    config.lock()
    return config
