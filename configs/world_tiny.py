"""The demo: one or two shapes in a plain box, small enough to train on a laptop CPU. Gives the reference weights.

    python -m vdm_jax.train --config=configs/world_tiny.py --workdir=runs/world_tiny
    python -m vdm_jax.checkpoint export --workdir=runs/world_tiny --out=vdm_jax/reference

On two CPU cores that other work shared (with AMX, and config.compute_dtype=bfloat16 but for most of the video
autoencoder): video autoencoder 4,000 steps of about 0.27 s, PSNR 35.6 dB and SSIM 0.983 on held-out clips; audio
autoencoder 3,000 of 0.1 s, 97 % of onsets within half a frame; text encoder 1,500 of 0.7 s, the last 900 with near
misses, recall at 1 of 100 % among 64; denoiser 20,400 of 1.05 to 1.45 s, 653 thousand clips seen. Then, on one H200
(jax 0.11.2) and in bfloat16, 6,616 steps of 256 clips and 35 to 44 ms, 1.69 million clips in five minutes; 4,900 on
near misses and 8,500 beside an anchor, both below. Figures, the tables in README.md:
`python -m vdm_jax.evaluate --out=report --tasks=32 --samplers=dpmpp_2m:16`.

On an H100 (jax 0.11.2), `python -m vdm_jax.bench --config=configs/world_tiny.py --config.denoiser.batch_size=128
--config.compute_dtype=bfloat16`: 25 ms a step, 5,063 clips a second, 17 TFLOP/s, 1.7 % of the peak, with a compile of
158 s beside two other compiles.

The denoiser's run was not one: its learning rate fell as over 4,600, 3,200, 10,000, 9,200, 8,400, 13,000 and 14,200
steps before as over 13,600. Up to step 5,301 it had one text layer, sound and picture met at the bottleneck alone, and
4 % of its clips were given their sound where it is 8 % now; up to step 8,400 the text layers knew no positions;
with them they began anew. What was added began as nothing (zero outputs), so that nothing was unlearnt. Up to step
13,600 shift was 1 and sigmoid_bias -1; the 3,400 steps after, in float32 and on a machine without AMX, began with a new
optimiser, a peak of 2e-3 (falling as over 4,500 steps for the first 449, then as over 3,400) and the clips of seed 1.
So did the 3,400 after them, with seed 2, objects (0.3, 0.7), and from their step 201 on same 0.58, first_given 0.12.
The GPU's steps began anew once more: seed 5, objects (0.25, 0.75), 98,304 clips encoded, ema 0.9993, the learning rate
that of a peak of 4e-3 and 30,000 steps from its step 23,078 to 29,694, and patterns same 0.46, per_modality 0.06,
per_frame 0.05, video_given 0.06, audio_given 0.14, image_given 0.05, first_given 0.14, ends_given 0.02, pyramid 0.02.

Near misses came last, for which of two objects goes where. Of 47 held-out clips with two directions, the denoiser as
trained so far took the caption for likelier than the one with the two exchanged for 51 % (by its error at log_snr -7.5
and -6; chance: 50 %), and 77 % of the directions in its samples were as asked. The text was not at fault: from its
states, as the text layers leave them, one cross-attention trained for 600 steps of 128 captions reads which object has
which direction in 87 %. But the right words lower the loss by next to nothing. Directions are settled at log_snr -9 to
-5: of one object, turned round, it told 95 % at -9, 98 % at -6, 69 % at -4. Hence near_miss_objective there, 4,900
steps of 1.0 to 1.2 s in float32 on two cores without AMX, by a script around the same losses, on 12,288 clips, four in
five of them with two objects. 1,500 steps of 8 clips and 16 pairs, weight 0.5 and no anchor: told 83 and 87 %, but the
error by the right caption rose from 8 to 20 at -7.5, from 30 to 51 at -6. 1,600 of 14 and 10, the weights as below,
learning rate 1.5e-3: told 87 and 94 %, the errors as before; but samples had grown rough, one object right in 14 % of
prompts, as these small batches had spoilt what levels above -4 had learnt. 60 % of the way from the old weights to
these (arXiv:2109.01903) the samples were nearly whole. From there 1,800 of 10 and 8, learning rate 8e-4, and 12 clips
more, of which what the old weights predict was the target (v, weight 5, shift 1; of clips without given frames above
log_snr -5.5): told 92 and 89 %, and 97 % of directions as asked.

Shift and bias: with 1 and -1 the denoiser told a caption of two objects from one with shapes exchanged for 97 % of
96 clips at log_snr -4 and above, where clips show already what goes where, for 60 % at -6, where it is settled; and
of 32 steps even in time of that schedule three lay there. With shift 0.135 while sampling alone, 47 % of 32 prompts
with two objects were right instead of 31 %; trained on with both, 59 % after 1,250 steps.

What was tried: two levels of (64, 96) channels with time halved between them, 8,000 steps of 16 clips: one object
right in 94 % of 32 prompts, two in none, nor after 5,000 more steps with two text layers. With time kept whole and
two blocks a level of 112 channels two objects are there after 500 steps; after 2,400, 4 % of prompts with two are
right, 64 % of directions, 65 % of impacts sound. Guidance of 2, 4 and 7 gives the same on 24 prompts of each kind.
Rotary positions in the text layers: without them shapes went to the right one of two objects in 72 % of captions and
directions in 62 %, as read from the text encoder's states by two such layers and one cross-attention after 1,000 steps
of 64; with them in all, after 500. The denoiser that got them took the caption for likelier than the one with shapes
exchanged (by its error at log_snr 0, 128 clips) for 98 % of clips after 3,600 steps, 80 % before.
Near misses of the text encoder: of a caption and one with two words exchanged the text encoder preferred the right
one in 62 % before (chance: 50 %), in 81 % after.

A clip carried on, velocity change at the seam in frame widths a second, of 192 clips before it (in what is given), at
it and after it (in what is made): 0.023, 0.066 and 0.065; with the weights from the GPU, given_time=0.02, 0.023, 0.088
and 0.057 (truth: 0.003 to 0.008). Found with the latter: a history weight of 1 instead of 1.5 gave 0.105 at the seam.
Of 32 clips, jumps of a pixel a frame not counted: 0.088 with a text weight of 4, 0.068 with 1, hence onward_guidance;
then 0.091 with a history weight of 2.5. Of 105 objects in 96 clips without an impact near the seam the first frame made
lagged (0.035), and velocities went on with their smaller component 36 % too small. More than half of that came from
sample.given_time=0.02: log SNR 2.9 with this shift, a blur that training never shows. With 0, 15 %, and 0.083 at the
seam. Guidance by what is given makes the first frame lag (0.03; without 0.009). Guidance up to log SNR -2 alone with a
history weight of 3 and noise to begin with of 0.6 times the deviation (weight 2) gave 0.071 and 0.044 with given frames
noised, and with given_time=0 little (0.077 to 0.094). Of no use: 64 steps, levels even in log SNR or as karras, ddpm,
and frames that lag by 2 and 6 steps.

Prompts without directions: every caption had them, and of 64 prompts with two objects and none 19 % showed both.
Trained on with captions that leave them out, by small batches on a CPU or half a run on a GPU, weights learnt that and
forgot other things: 56 to 58 % without directions, but 75 to 88 % with, and a seam of 0.110 to 0.149.

Hence an anchor, for 5,900 steps: of each batch of 23 to 30 clips 11 to 16 have a beginning given (half of them four
latent frames; sigmoid_bias -4, up to three times the weight on the first frames made), 6 to 8 of the other patterns
have for their target what the weights from the GPU predict (v, weight 5, shift 1), the rest have captions without
directions. In float32 on two cores without AMX, 1.3 to 4 s a step, by a script around the same losses, on 16,384 clips
of seed 7, undirected 0.3 and objects (0.3, 0.7), with Muon and ema 0.998: three runs, each from where the one before
ended, learning rates by cosine from peaks of 8e-4, 8e-4 and 1e-3 over 2,050, 1,600 and 2,800 steps, the last one ended
after 2,250; the first with the error of x0 weighed up at all levels (0.03). The weights are the mean of the three
runs' averages (arXiv:2203.05482), by squared error of the first frame's x0 of 192 held-out clips at log SNR -8, -4 and
0: 398, 176 and 54.8 before; 355, 171 and 54.8, 369, 175 and 54.7, 372, 175 and 54.7 by run; 359, 171 and 54.3 by the
mean, so the first run is ahead at -8. Distance from what the anchor is: 0.0030, 0.0034 and 0.0046 by run, 0.0026. Of
64 prompts with two objects, 16 steps, the mean had 62 % right without directions and 95 % with; the last run alone 44
and 94 %. At the seam of 96 clips, with given_time=0, it had 0.100 with a history weight of 1, 0.082 with 1.5 (inside
0.062 and 0.061). What it cost: one or two points of most outcomes, onsets of a picture made for a sound that have an
impact (80 %, 86 % before), and clips rolled out to ten times the length hold less well (81 % as asked at the end, 88 %
before). These choices were made on 64 of evaluate's prompts and 96 of the 192 clips. An earlier 6,000 steps of such
runs, not kept, reached 0.070 and 0.059 at the seam of 192 clips with a history weight of 1, and 91 % without
directions.

The last 2,600 steps were one more such run, from that mean, which is its anchor, too: 20 clips with a beginning, 8 of
the anchor, 2 without directions, x0 weighed up as in the first run, a peak of 1e-3, 1.5 to 2.4 s a step. The weights
are 0.7 of its average and 0.3 of that mean, errors 330, 166 and 54.6 (its average alone: 324, 166 and 55.0), distance
from the anchor 0.0010 (0.0018). At the seam of the 96 clips 0.074, inside 0.060.

Where prompts without directions fail, one object comes as two, or both of two in one's colour. Of 96 such prompts,
clips 2,000 on, these weights have 80 % with one object right and 64 % with two; in 64 steps 84 and 60 %, by ddpm in
48 steps 86 and 67 %. 700 more steps of 14 clips without directions and 14 of the anchor (4,096 and 3,072 clips,
learning rate 8e-4): 75 and 56 %.

The leap: decoded with what is given, x0 as predicted in one step from pure noise shows 0.065 at the seam of these 96
clips, the samples 0.074, and 0.087 with a history weight of 1. The mean of what may follow is nearer to what does than
a draw. Of 96 other clips, without an impact from frame 3 to 10, distance of the first frame made from the true one in
pixels (median; root mean square, of 110 objects), change of velocity at the seam and inside, objects right:

    history weight 1.5, no leap                    0.31  0.41    0.069  0.054    99 %
    history weight 2                               0.31  0.40    0.078  0.056   100 %
    history weight 2.5                             0.33  0.41    0.085  0.050    98 %
    one frame to log SNR -2                        0.27  0.32    0.060  0.060    97 %
    one frame to log SNR -2, history weight 2      0.25  0.32    0.063  0.056    99 %
    one frame to log SNR -1                        0.23  0.29    0.061  0.061    98 %
    one frame to log SNR -1, history weight 1.25   0.23  0.29    0.060  0.062    99 %
    two frames to log SNR -1 and -3                0.23  0.28    0.059  0.059    97 %
    two frames to log SNR 0 and -1                 0.20  0.26    0.058  0.061    97 %
    two frames to 0 and -1, history weight 1.25    0.21  0.26    0.058  0.059    97 %
    three frames to log SNR 0, -2 and -4           0.20  0.26    0.059  0.062    97 %
    the weights before, no leap                    0.36  0.47    0.075  0.055    99 %
    the weights before, two frames to 0 and -1     0.23  0.30    0.066  0.057    99 %

leap=(0.09, 0.14) is log SNR 0 and -1. All frames to -2, -4 or -6: 70, 84 and 90 % of the first 96 clips right, 95 %
without. Earlier tries on these, with the weights before: 0.080 (inside 0.061) with six given latent frames instead of
four or without modality_guidance; without the latter and with guidance away from given frames that are noised to
t = 0.3, instead of from none, weight 2, 0.077 (0.059); to t = 0.15, 0.097; to 0.5, 0.083; to 0.4, weight 3, 0.095; to
the level of the frames made, 0.084. Given frames noised like those made from log SNR -2 on: 0.083.

Pictures made for a sound, onsets that have an impact, of 48 clips from number 3,000 on: 80 % with a text weight of 4,
83 % with 2.5 (hence across_guidance) or with a history weight of 2.5 beside 4, 85 % with 2.5 of both. Of 96, with a
text weight of 2.5: 83 % with a history weight of 1.5, of 2.5 and of 3.5, 80.5 % with 1.5 in 64 steps; 79.5 % with a
text weight of 1.5 and a history weight of 2.5.

Muon against AdamW on the video autoencoder, same model, batches and data, PSNR with a sampled latent while training:
28.1 dB against 23.9 dB after 300 steps (learning rates 4e-3 and 1.5e-3).
"""

from configs import common
from vdm_jax.data import world


def get_config():
    config = common.get_config()
    config.unlock()

    config.data.world = dict(
        objects=(0.4, 0.6), gravity=0.0, occluder=0.0, leave=0.0, pan=0.0, light=0.0, undirected=0.0
    )

    vae = config.video_autoencoder
    vae.update(steps=4000, batch_size=8, learning_rate=4e-3, kl_weight=1e-4)
    vae.model.update(
        channels=(48, 96), space_strides=(1,), time_strides=(2,), blocks=(0, 2), middle_blocks=0, latent_channels=24
    )

    audio = config.audio_autoencoder
    audio.update(steps=3000, batch_size=8, learning_rate=4e-3, kl_weight=1e-4)
    audio.model.update(patch=50, channels=(64, 128), strides=(5,), blocks=(1, 1))

    clip = config.clip
    clip.update(steps=1500, batch_size=64, near_misses=(world.COLOURS, world.SHAPES, world.DIRECTIONS))
    clip.model.text.update(width=96, layers=2, heads=3)
    clip.model.video.update(channels=(48, 64, 96))
    clip.model.embedding = 96

    denoiser = config.denoiser
    denoiser.update(steps=40416, batch_size=32, learning_rate=3e-3, ema=0.999, cached_clips=24576)
    denoiser.near_misses = (world.DIRECTIONS,)
    # What moves, and which thing is which, shows in all latents of a clip at once: it is settled at far more noise than
    # a single latent would be.
    denoiser.diffusion.update(shift=0.135, sigmoid_bias=-5.0)
    denoiser.diffusion.loss_weights.audio = 0.5
    denoiser.diffusion.patterns = dict(
        same=0.64,
        per_modality=0.06,
        per_frame=0.04,
        video_given=0.04,
        audio_given=0.08,
        image_given=0.04,
        first_given=0.06,
        ends_given=0.02,
        pyramid=0.02,
    )
    denoiser.model.update(
        channels=(48, 112),
        audio_channels=(32, 64),
        blocks=(1, 2),
        exchange=(False, True),
        time_strides=(1,),
        head_dim=28,
        embedding=128,
        text_layers=2,
    )

    config.sample.update(history_guidance=1.5, modality_guidance=1.5, given_time=0.0, leap=(0.09, 0.14))

    config.lock()
    return config
