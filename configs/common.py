"""Every key with its default. A recipe calls `get_config()` and states only what differs.

The defaults are a complete model of the procedural world, of middle size. No figure in docs/ was made with them.
vdm_jax/settings.py has the allowed values of each key, and its rule for a run that goes on.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.seed = 0  # of the data, of the initial parameters and of all noise in training
    config.checkpoint_every = 500  # steps
    config.log_every = 50  # steps
    config.keep = ConfigDict(
        dict(
            newest=2,  # number of newest checkpoints to keep
            best=1,  # number of checkpoints to keep with the lowest mean loss since the checkpoint before
        )
    )
    config.validation = ConfigDict(  # what a run shows while it trains, see docs/training.md
        dict(
            every=1000,  # steps; also before the first step and after the last; 0: never
            clips=8,  # held-out clips on which the loss is measured
            noise_levels=8,  # at which the error of the denoiser is measured
            # What the denoiser samples: texts, or {"text": "...", "seed": 0} with one of the keys image, video, audio
            # and continue, which name a file. (): captions of held-out clips.
            prompts=(),
            raw=False,  # also show the weights without their moving average
        )
    )
    config.wandb = ConfigDict(  # Weights & Biases, which gets what TensorBoard gets
        dict(
            project="",  # name of the project; "" for no Weights & Biases
            mode="offline",  # keep it in the folder of the run; "online" sends it
        )
    )
    config.heartbeat_every = 10.0  # least seconds between two writings of DIR/heartbeat.json
    config.skip = ConfigDict(  # a step is skipped if its loss or its gradient is not finite
        dict(
            loss_over_mean=0.0,  # also skip a step whose loss is more than this many times the moving average; 0: never
            stop_after=10,  # end the run after this number of skipped steps in a row
        )
    )
    # "float32", or "bfloat16". Parameters and optimizer are always float32. On a CPU only the operands of matrix
    # products are bfloat16.
    config.compute_dtype = "float32"
    config.compilation_cache = ""  # folder that keeps compiled programs for later runs; "" for none
    config.watchdog_seconds = 1800.0  # end a run of several processes after this time without a step; 0: never
    config.mesh = ConfigDict(  # devices along each axis; -1 takes all that are left
        dict(data=-1, fsdp=1, sequence=1, tensor=1)
    )

    # ------------------------------------------------------------------------------------------------------- data
    data = config.data = ConfigDict()
    data.source = "world"  # "world", "files", "tfds" or "doom"
    data.path = ""  # files: the folder of videos; tfds: the data_dir
    data.hash = ""  # of the videos and captions; a run writes it down when it starts
    data.frames = 17  # video frames a clip: 1 + f_t * n, where f_t is the number of frames per latent frame
    data.size = (32, 32)  # height and width, in pixels
    # Shapes of clips that the denoiser is trained on in turn, such as ("17x48x64", "33x96x160"): frames x height x
    # width. Videos go to the most similar shape, see data/buckets.py. (): data.frames and data.size alone.
    data.buckets = ()
    data.fps = 8.0  # frames a second; 29.97 is 30000/1001, see data/rates.py
    data.sample_rate = 8000  # Hz
    data.text_length = 128  # byte tokens of a caption; a longer caption is cut
    # Names of the buttons that clips come with, frame by frame: () for none. For "doom": CONTROL of data/doom.py.
    data.control = ()
    data.threads = 1  # that read clips
    data.prefetch = 4  # batches that are read ahead
    data.world = ConfigDict(  # see World in data/world.py
        dict(
            objects=(0.5, 0.35, 0.15),  # chances of one, two and three objects
            gravity=0.2,  # chance of gravity in a clip
            occluder=0.2,  # chance of a bar that hides objects
            leave=0.2,  # chance of open sides, where objects leave and come back
            pan=0.2,  # chance of a moving camera
            light=0.2,  # chance of changing light
            undirected=0.0,  # chance of a caption that leaves directions out
            wordings=0.0,  # chance of a caption in the many words of data/wordings.py
        )
    )
    data.files = ConfigDict(  # see data/files.py
        dict(
            held_out=0.2,  # share of the videos that training does not see
            flip=False,  # mirror half of the windows, except where the caption tells left from right
        )
    )
    data.doom = ConfigDict(  # see data/doom.py
        dict(
            held_out=("MAP04", "MAP11", "MAP19", "MAP26"),  # levels of Freedoom 2 that training does not see
            episodes=0,  # episodes that are recorded, and then seen again and again; 0: each is new
        )
    )
    data.tfds = ConfigDict(  # see data/tfds.py
        dict(
            name="",  # of the data set
            split="train[:90%]",  # examples of training, in the notation of TFDS
            held_out="train[90%:]",  # other examples, which training does not see; "" holds nothing out
            video_key="video",  # feature of the frames
            audio_key="",  # feature of the sound; "" for silent clips
            caption_key="caption",  # feature of the caption
            source_fps=0.0,  # frames a second in the data set; 0 for data.fps
            source_sample_rate=0,  # Hz in the data set; 0 for data.sample_rate
        )
    )

    # ------------------------------------------------------- parts that are not trained here, see system/parts.py
    config.video_codec = ConfigDict(  # a part in place of the stage video_autoencoder
        dict(
            source="",  # folder of a published model, a run or exported weights, or "reference"; "": trained here
            hash="",  # of its weights; a run writes it down when it starts
        )
    )
    config.audio_codec = ConfigDict(  # a part in place of the stage audio_autoencoder
        dict(
            source="",  # folder of a published model, a run or exported weights, or "reference"; "": trained here
            hash="",  # of its weights; a run writes it down when it starts
        )
    )
    config.text_encoder = ConfigDict(  # a part in place of the stage clip
        dict(
            source="",  # folder of a published model, a run or exported weights, or "reference"; "": trained here
            hash="",  # of its weights; a run writes it down when it starts
        )
    )

    # ------------------------------------------------------------------------------------------- the four stages
    def optimizer(**different):
        base = dict(
            steps=2000,  # of the whole stage
            phases=(),  # parts of the training with settings of their own, see system/phases.py; () for one part
            batch_size=16,  # clips, over all devices
            accumulate=1,  # parts of a batch, whose gradients are computed one after the other
            remat="none",  # what the backward pass computes again: "none", "pointwise" or "blocks"; models/layers.py
            optimizer="muon",  # or "adamw"
            learning_rate=2e-3,  # after warm-up; it falls to zero along a cosine
            warmup_steps=100,  # steps in which the learning rate rises
            weight_decay=0.0,  # of kernels
            beta2=0.99,  # decay of Adam's second moment per step
            clip_norm=1.0,  # largest global norm of the gradient
            ema=0.999,  # decay of the averaged parameters per step; lower in the first steps
        )
        return ConfigDict({**base, **different})

    vae = config.video_autoencoder = optimizer()
    vae.kl_weight = 1e-4  # on the KL divergence per pixel
    vae.model = ConfigDict(
        dict(
            patch=4,  # patch x patch pixels become one place
            channels=(64, 96, 128),  # at each resolution
            space_strides=(1, 1),  # how height and width shrink between resolutions
            time_strides=(2, 2),  # how time shrinks between resolutions
            blocks=(1, 1, 1),  # residual blocks at each resolution, in either direction
            middle_blocks=2,  # residual blocks at the lowest resolution
            latent_channels=16,
            groups=8,  # of group normalization
        )
    )

    audio = config.audio_autoencoder = optimizer()
    audio.kl_weight = 1e-4  # on the KL divergence per sample
    audio.wave_weight = 1.0  # on the error of the waveform
    audio.stft_weight = 0.1  # on the distance of spectra; 0: none
    audio.stft_windows = (64, 256, 1024)  # samples
    audio.mel_weight = 0.0  # on the distance of levels of mel bands, for sounds of many kinds; 0: none
    audio.mel_windows = (4, 8, 16, 32, 64)  # ms
    audio.model = ConfigDict(
        dict(
            patch=10,  # samples that become one place
            channels=(32, 64, 128),  # at each resolution
            strides=(5, 5),  # how time shrinks between resolutions
            blocks=(1, 1, 1),  # residual blocks at each resolution, in either direction
            latent_channels=16,
            groups=8,  # of group normalization; 0: none, and snake activations, for sound of many loudnesses
            overlap=False,  # whether the windows of resampling are two strides long, or one
        )
    )

    clip = config.clip = optimizer(batch_size=64, weight_decay=0.01)
    clip.hard_negatives = ConfigDict(
        dict(words=())  # groups of words; swapping two words of a group in a caption makes an extra wrong caption
    )
    clip.model = ConfigDict(
        dict(
            text=ConfigDict(dict(width=128, layers=3, heads=4)),  # the text transformer
            video=ConfigDict(dict(patch=4, channels=(64, 128, 128), groups=8)),  # the video tower
            embedding=128,  # channels of the common space of texts and videos
        )
    )

    denoiser = config.denoiser = optimizer(steps=20000, batch_size=32)
    # Folder of a published pipeline (ModelScope, ZeroScope), whose denoiser is trained further on its own autoencoder
    # and text encoder; see docs/published.md. "": the network of denoiser.model.
    denoiser.source = ""
    denoiser.hash = ""  # of its weights and of its noise schedule; a run writes it down when it starts
    denoiser.text_dropout = 0.1  # share of clips that are trained without their caption
    denoiser.control_dropout = 0.1  # share of clips that are trained without their control, half of them without text
    denoiser.cached_clips = 0  # clips that are encoded once, before training; 0 encodes each batch when it is used
    denoiser.latents = ""  # folder of these encoded clips, from `prepare --latents`; "": the run encodes them itself
    denoiser.statistics_clips = 256  # clips whose latents are measured, to scale latents to unit variance
    denoiser.hard_negatives = ConfigDict(  # system/hard_negatives.py
        dict(
            words=(),  # groups of words; () for no hard negatives
            every=4,  # one clip in this number of clips is used
            log_snr=(-9.0, -4.5),  # range of noise levels; there the model decides which object has which attribute
            weight=0.1,  # of the classification loss
            anchor=0.02,  # of the error with the right caption; without it both errors may grow
        )
    )
    denoiser.distillation = ConfigDict(  # of a student that needs few steps, see vdm_jax/system/distillation.py
        dict(
            teacher="",  # folder of exported weights, or "reference"; "" for a denoiser that is no student
            hash="",  # of the teacher's weights; a run writes it down when it starts
            steps=(4, 8, 16, 32, 64),  # numbers of steps in a clip that the student learns; each is half of the next
            teacher_share=0.75,  # of the batch, trained on the shortest step
            guidance=ConfigDict(  # of the teacher, as in config.sample
                dict(text=4.0, text_continue=1.0, text_cross_modal=2.5, history=1.0, modality=1.0)
            ),
        )
    )
    denoiser.lora = ConfigDict(  # adapters, which are trained instead of all parameters; see vdm_jax/lora.py
        dict(
            rank=0,  # of the adapters; 0 trains all parameters
            alpha=8.0,  # the adapters count with the scale alpha / rank
            layers="",  # regular expression: kernels in whose paths it is found get an adapter; "" for all kernels
            base="",  # what the adapters change: folder of a run or of exported weights, or "reference"
        )
    )
    # Regular expression: only parameters in whose paths it is found are trained; "" for all.
    denoiser.trained = ""
    denoiser.memory = ConfigDict(  # training of a memory, see vdm_jax/system/memory.py
        dict(
            windows=1,  # consecutive windows of a training clip, over which the memory is unrolled; 1: no memory
            cuts=0.25,  # share of clips in which a window of another clip lies between
        )
    )
    denoiser.diffusion = ConfigDict(  # see vdm_jax/diffusion.py
        dict(
            schedule="cosine",  # or "sigmoid" or "linear_beta"; "published": that of denoiser.source
            log_snr_min=-12.0,  # log SNR of pure noise
            log_snr_max=12.0,  # log SNR of a clean frame
            shift=1.0,  # multiplies alpha / sigma; below 1 there is more noise at every time
            target="v",  # what the network predicts: "v", "x0" or "noise"
            weighting="sigmoid",  # of the loss over noise levels; or "uniform" or "min_snr"
            min_snr_gamma=5.0,  # of weighting "min_snr"
            sigmoid_bias=-1.0,  # of weighting "sigmoid"; lower puts more weight on noisy levels
            loss_weights=ConfigDict(dict(video=1.0, audio=1.0)),
            patterns=ConfigDict(  # shares of a batch that are trained on each pattern of noise levels
                {
                    "text": 0.6,
                    "per_modality": 0.1,
                    "per_frame": 0.05,
                    "foley": 0.05,
                    "audio": 0.05,
                    "image": 0.05,
                    "continue": 0.05,
                    "between": 0.025,
                    "pyramid": 0.025,
                }
            ),
        )
    )
    denoiser.model = ConfigDict(
        dict(
            patch=1,  # patch x patch latents become one place
            channels=(96, 192),  # at each resolution; space halves between resolutions
            audio_channels=(),  # of the sound, at each resolution; () for the channels of the picture
            blocks=(2, 2),  # residual blocks at each resolution, in either direction
            attention=(False, True),  # whether a resolution has self-attention and cross-attention to the text
            cross_modal=(False, True),  # whether sound and picture attend to each other at a resolution
            time_strides=(1,),  # 1 or 2: how time shrinks between resolutions
            factorized=True,  # convolutions in space, then in time; False for full 3-D convolutions
            head_dim=32,  # channels of an attention head
            embedding=256,  # channels of the embedding of noise level, time and text
            text_layers=0,  # transformer layers on the text, trained with the denoiser
            student=False,  # whether the network reads where a step goes, as a student does; see distillation
            use_bias=True,  # False leaves out most biases, for faster steps and a shorter compilation
            groups=8,  # of group normalization
            memory=0,  # memory tokens, which carry a scene from window to window; 0: no memory
            memory_width=64,  # channels of a memory token
            memory_past=2,  # windows before the context that a memory also keeps as latents, the older the coarser
        )
    )

    # ------------------------------------------------------------------------------------------ sample, evaluate
    config.sample = ConfigDict(
        dict(
            method="dpmpp_2m",  # or "ddim", "ddpm" or "heun"
            steps=32,
            spacing="time",  # what is evenly spaced over the steps: "time", "log_snr" or "karras"
            guidance=ConfigDict(  # scales of guidance; 1 adds nothing
                dict(
                    text=4.0,
                    text_continue=1.0,  # of the text where a clip is continued; a high weight alters the motion
                    text_cross_modal=2.5,  # of the text where the picture or the sound is context as a whole
                    history=1.0,  # of the context frames
                    modality=1.0,  # of the sound on the picture, and of the picture on the sound
                )
            ),
            history_noise=0.0,  # time in [0, 1] to which history guidance noises the context; 0 leaves it clean
            rescale=0.0,  # share by which a frame's standard deviation is put back to that without guidance
            interval=(-12.0, 12.0),  # log SNR in which guidance acts; as wide as log_snr_min to log_snr_max: everywhere
            # Context frames of a modality that also has generated frames are noised to this time in [0, 1], and the
            # model is told so. At time 0.02 the log SNR is 6.8 with shift 1, and 2.9 with shift 0.135, a visible blur.
            context_noise=0.02,
            first_step_times=(),  # times that the first generated frames of a continued clip reach in one step
            lag=0,  # steps by which each latent frame follows the one before; above 0 it is a pyramid
            context_frames=4,  # latent frames that each window of a long clip gets from the window before
        )
    )
    config.evaluate = ConfigDict(
        dict(
            clips=64,  # held-out clips that are reconstructed
            prompts=128,  # for each number of objects
            tasks=32,  # held-out clips in each task
            copies=10_000,  # training clips that samples are compared with
            batch_size=16,  # clips that are measured at once
        )
    )
    config.lock()
    return config
