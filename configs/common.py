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
    # Or "bfloat16"; parameters and optimiser are always float32, and on a CPU all but the operands of products.
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
    def optimiser(**different):
        base = dict(
            steps=2000,
            batch_size=16,  # clips, over all devices
            accumulate=1,  # parts of a batch whose gradients are computed one after the other
            remat="none",  # what the backward pass computes again: "none", "pointwise" or "blocks"; layers.py
            optimiser="muon",  # or "adamw"
            learning_rate=2e-3,  # peak, after warm-up; cosine decay to zero
            warmup_steps=100,
            weight_decay=0.0,
            beta2=0.99,
            clip_norm=1.0,  # global gradient norm
            ema=0.999,  # decay a step, ramped up at the start
        )
        return ConfigDict({**base, **different})

    vae = config.video_autoencoder = optimiser()
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

    audio = config.audio_autoencoder = optimiser()
    audio.kl_weight = 1e-4  # on the KL a sample
    audio.stft_weight = 0.1
    audio.stft_windows = (64, 256, 1024)  # samples
    audio.model = ConfigDict(
        dict(patch=10, channels=(32, 64, 128), strides=(5, 5), blocks=(1, 1, 1), latent_channels=16, groups=8)
    )

    clip = config.clip = optimiser(batch_size=64, weight_decay=0.01)
    clip.near_misses = ()  # groups of words; captions with words of a group exchanged become wrong answers (text.py)
    clip.model = ConfigDict(
        dict(
            text=ConfigDict(dict(width=128, layers=3, heads=4)),
            video=ConfigDict(dict(patch=4, channels=(64, 128, 128), groups=8)),
            embedding=128,
        )
    )

    denoiser = config.denoiser = optimiser(steps=20000, batch_size=32)
    denoiser.text_dropout = 0.1  # share of examples trained on the null text
    denoiser.cached_clips = 0  # clips encoded once, before training, and reused; 0 encodes every batch afresh
    denoiser.statistics_clips = 256  # clips measured to scale latents to unit variance
    denoiser.near_misses = ()  # groups of words, as clip.near_misses: the denoiser is to tell captions by its error
    denoiser.near_miss = ConfigDict(  # diffusion.near_miss_objective; of use with near_misses alone
        dict(
            every=4,  # every so manyth clip of a batch is denoised twice more: by its caption, and by the nearly right
            log_snr=(-9.0, -4.5),  # between these: where what the words are about is settled
            weight=0.1,
            anchor=0.02,  # weight of the error by the right caption: without it both may grow
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
                dict(
                    same=0.6,
                    per_modality=0.1,
                    per_frame=0.05,
                    video_given=0.05,
                    audio_given=0.05,
                    image_given=0.05,
                    first_given=0.05,
                    ends_given=0.025,
                    pyramid=0.025,
                )
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
            exchange=(False, True),  # sound and picture attend to each other at this level
            time_strides=(1,),  # time halving between levels
            factorised=True,
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
            guidance=4.0,  # weight of the text; 1 adds nothing, for this and the next four
            onward_guidance=1.0,  # the same where a clip goes on: its beginning tells how things move, text bends that
            across_guidance=2.5,  # the same where picture or sound is given whole: the other is to fit it first
            history_guidance=1.0,  # weight of what is given
            history_fraction=0.0,  # 0: guidance by what is given against nothing; t: by what is given noised to time t
            modality_guidance=1.0,  # weight of the sound on the picture, and of the picture on the sound
            rescale=0.0,
            interval=(-12.0, 12.0),  # log_snr, in which guidance acts
            # Frames to go on from are lightly noised to this time, and the model is told so. It is the schedule's:
            # log SNR 6.8 with a shift of 1, 2.9 with 0.135 (world_tiny.py), which blurs how things move.
            given_time=0.02,
            leap=(),  # where a clip goes on: times that its first frames reach in one step, samplers.schedule_matrix
            lag=0,  # steps by which each latent frame is behind the one before; above 0: a pyramid
            history=4,  # latent frames that each window of a long clip is given of the one before
        )
    )
    config.evaluate = ConfigDict(dict(clips=64, prompts=128, batch_size=16))  # prompts of each number of objects
    config.lock()
    return config
