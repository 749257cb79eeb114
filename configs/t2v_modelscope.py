"""Trains ModelScope's or ZeroScope's text-to-video model further on your clips, without sound. Not yet run.

    python -m vdm_jax.train --config=configs/t2v_modelscope.py --workdir=runs/mine --config.data.path=CLIPS \\
        --config.denoiser.source=FOLDER
    python -m vdm_jax.train --config=configs/t2v_modelscope.py:lora --workdir=runs/adapters --config.data.path=CLIPS \\
        --config.denoiser.source=FOLDER

FOLDER is the folder of the pipeline (TextToVideoSDPipeline of diffusers): docs/published.md tells where to get it. Its
denoiser is trained, and its autoencoder and text encoder stay as they are. configs/published/modelscope has the sizes
of its parts, which is enough for dry_run. The second command trains adapters alone.
Clips: 16 frames of 256 x 256 pixels, at 8 frames a second.
"""

from configs import common
from vdm_jax.errors import one_of

# Attention in space and in time, as in the adapters that are shared for these models.
LAYERS = r"attn[12]/(to_q|to_k|to_v|to_out\.0)/kernel$"


def get_config(trained="all"):
    config = common.get_config()
    config.unlock()
    config.compute_dtype = "bfloat16"
    config.mesh.update(data=1, fsdp=-1)
    config.data.update(source="files", frames=16, size=(256, 256), text_length=77)

    denoiser = config.denoiser
    denoiser.source = "configs/published/modelscope"
    denoiser.update(steps=5000, batch_size=8, learning_rate=1e-5, warmup_steps=500, optimizer="adamw", remat="blocks")
    denoiser.update(weight_decay=0.01, beta2=0.999)
    denoiser.diffusion.update(schedule="published", target="noise", weighting="uniform")
    denoiser.diffusion.patterns = dict(text=1.0)
    if one_of("choice", trained, ("all", "lora")) == "lora":
        denoiser.update(batch_size=1, learning_rate=1e-4)
        denoiser.lora.update(rank=16, alpha=16.0, layers=LAYERS)
    config.lock()
    return config
