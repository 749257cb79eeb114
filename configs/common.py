"""Every key with its default. A recipe calls `get_config()` and states only what differs.

The values here are a complete, middling model of the procedural world; recipes say what was run and what it reached.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.checkpoint_every = 500  # steps
    config.log_every = 50  # steps
    config.keep = ConfigDict(dict(newest=2, best=1))  # checkpoints; best: of least loss over the steps before
    config.preview_every = 1000  # steps; 0 for none
    config.heartbeat_every = 10.0  # seconds, at least, between two writings of DIR/heartbeat.json
    # Steps with numbers that are not finite are skipped, and with loss_over_mean > 0 those whose loss is more than that
    # many times its moving average; stop_after of them in a row end the run.
    config.skip = ConfigDict(dict(loss_over_mean=0.0, stop_after=10))
    # Or "bfloat16"; parameters and optimizer are always float32, and on a CPU all but the operands of products.
    config.compute_dtype = "float32"
    config.compilation_cache = ""  # folder of the persistent compilation cache; "" for none
    config.watchdog_seconds = 1800.0  # of several processes: without a step for so long, all end; 0 for never
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, sequence=1, tensor=1))  # -1 takes the devices that are left

    # ------------------------------------------------------------------------------------------------------- data
    data = config.data = ConfigDict()
    data.source = "world"  # "world", "files" or "tfds"
    data.path = ""  # files: the folder; tfds: the data_dir
    data.frames = 17  # frames a clip, 1 + f_t * (T - 1)
    data.size = 32  # pixels, height and width
    data.fps = 8  # frames a second
    data.sample_rate = 8000  # Hz
    data.text_length = 128  # byte tokens
    data.threads = 1
    data.prefetch = 4  # batches
    data.world = ConfigDict(  # see data/world.py
        dict(objects=(0.5, 0.35, 0.15), gravity=0.2, occluder=0.2, leave=0.2, pan=0.2, light=0.2)
    )
    data.files = ConfigDict(dict(held_out=0.2))  # share of each video's end kept from training
    data.tfds = ConfigDict(  # see data/tfds.py
        dict(
            name="",
            split="train",
            video_key="video",
            audio_key="",  # "" for none: silent clips
            caption_key="caption",
            source_fps=0.0,  # of the data set's videos; 0: data.fps
            source_sample_rate=0,  # Hz, of its sound; 0: data.sample_rate
        )
    )

    # ------------------------------------------------------------------------------------------- the four stages
    def optimizer(**different):
        base = dict(
            steps=2000,
            batch_size=16,  # clips, over all devices
            accumulate=1,  # parts of a batch whose gradients are computed one after the other
            remat="none",  # what the backward pass computes again: "none", "pointwise" or "blocks"; layers.py
            optimizer="muon",  # or "adamw"
            learning_rate=2e-3,  # peak, after warm-up; cosine decay to zero
            warmup_steps=100,
            weight_decay=0.0,
            beta2=0.99,
            clip_norm=1.0,  # global gradient norm
            ema=0.999,  # decay a step, ramped up at the start
        )
        return ConfigDict({**base, **different})

    vae = config.video_autoencoder = optimizer()
    vae.kl_weight = 1e-4  # on the KL a pixel
    vae.model = ConfigDict(
        dict(
            patch=4,
            channels=(64, 96, 128),
            space_strides=(1, 1),
            time_strides=(2, 2),
            blocks=(1, 1, 1),  # residual blocks a level
            middle_blocks=2,
            latent_channels=16,
            groups=8,
        )
    )

    audio = config.audio_autoencoder = optimizer()
    audio.kl_weight = 1e-4  # on the KL a sample
    audio.stft_weight = 0.1
    audio.stft_windows = (64, 256, 1024)  # samples
    audio.model = ConfigDict(
        dict(patch=10, channels=(32, 64, 128), strides=(5, 5), blocks=(1, 1, 1), latent_channels=16, groups=8)
    )

    clip = config.clip = optimizer(batch_size=64, weight_decay=0.01)
    # Groups of words. A caption with two words of a group swapped is one more wrong answer; () for none.
    clip.hard_negatives = ConfigDict(dict(words=()))
    clip.model = ConfigDict(
        dict(
            text=ConfigDict(dict(width=128, layers=3, heads=4)),
            video=ConfigDict(dict(patch=4, channels=(64, 128, 128), groups=8)),
            embedding=128,
        )
    )

    denoiser = config.denoiser = optimizer(steps=20000, batch_size=32)
    denoiser.text_dropout = 0.1  # share of examples trained on the null text
    denoiser.cached_clips = 0  # clips encoded once, before training, and reused; 0 encodes every batch afresh
    denoiser.statistics_clips = 256  # clips measured to scale latents to unit variance
    denoiser.hard_negatives = ConfigDict(  # system/hard_negatives.py
        dict(
            words=(),  # as clip.hard_negatives.words; () for none
            every=4,  # the loss applies to one clip in so many of a batch
            log_snr=(-9.0, -4.5),  # the range of noise levels: there the model decides what the words are about
            weight=0.1,  # of the classification loss
            anchor=0.02,  # weight of the error with the right caption: without it both errors may grow
        )
    )
    denoiser.diffusion = ConfigDict(
        dict(
            schedule="cosine",
            log_snr_min=-12.0,
            log_snr_max=12.0,
            shift=1.0,
            target="v",
            weighting="sigmoid",
            min_snr_gamma=5.0,
            sigmoid_bias=-1.0,
            loss_weights=ConfigDict(dict(video=1.0, audio=1.0)),
            patterns=ConfigDict(  # share of the batch trained on each pattern of noise levels
                {
                    "text": 0.6,
                    "per_modality": 0.1,
                    "per_frame": 0.05,
                    "foley": 0.05,
                    "audio": 0.05,
                    "image": 0.05,
                    "continue": 0.05,
                    "between": 0.025,
                    "rollout": 0.025,
                }
            ),
        )
    )
    denoiser.model = ConfigDict(
        dict(
            patch=1,  # latents, height and width, that the network sees as one place
            channels=(96, 192),  # per level; space halves between levels
            audio_channels=(),  # of the sound, per level; () for the same
            blocks=(2, 2),  # residual blocks a level, on the way down and again up
            attention=(False, True),  # self- and cross-attention at this level
            cross_modal=(False, True),  # sound and picture attend to each other at this resolution
            time_strides=(1,),  # time halving between levels
            factorized=True,
            head_dim=32,
            embedding=256,  # noise level and temporal position
            text_layers=0,  # transformer layers on the text, trained with the denoiser
            groups=8,
        )
    )

    # ------------------------------------------------------------------------------------------ sample, evaluate
    config.sample = ConfigDict(
        dict(
            method="dpmpp_2m",
            steps=32,
            spacing="time",
            guidance=ConfigDict(  # weights of guidance; 1 adds nothing
                dict(
                    text=4.0,
                    text_continue=1.0,  # of the text where a clip is continued: a higher weight bends the motion
                    text_cross_modal=2.5,  # of the text where picture or sound is given whole
                    history=1.0,  # of the context frames
                    modality=1.0,  # of the sound on the picture, and of the picture on the sound
                )
            ),
            history_noise=0.0,  # time in [0, 1]: history guidance withholds the context frames' detail; 0: all of them
            rescale=0.0,  # share by which the standard deviation of each frame is put back to the unguided one
            interval=(-12.0, 12.0),  # log_snr, in which guidance acts
            # Context frames of a clip that is continued are noised to this time in [0, 1], and the model is told so.
            # The time is the schedule's: 0.02 is log SNR 6.8 with shift 1, and 2.9 with shift 0.135, a visible blur.
            context_noise=0.02,
            first_step_times=(),  # times that the first generated frames of a continued clip reach in their first step
            lag=0,  # steps by which each latent frame is behind the one before; above 0: a pyramid
            context_frames=4,  # latent frames that each window of a long clip gets from the one before
        )
    )
    config.evaluate = ConfigDict(
        dict(clips=64, prompts=128, tasks=32, batch_size=16)
    )  # prompts of each number of objects
    config.lock()
    return config
