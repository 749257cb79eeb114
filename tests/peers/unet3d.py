"""UNet3DConditionModel: settings for diffusers' and for ours, random weights, and an input for both.

python -m tests.peers.unet3d FOLDER     # writes a folder with random weights of ModelScope's size, in float16
"""

import sys

import numpy as np

from vdm_jax.models.published import naming
from vdm_jax.models.published.unet3d_condition import UNet3DConditionModel
from vdm_jax.run import huggingface

SETTINGS = dict(  # 52.94 M parameters; the benchmark times this model
    block_out_channels=(64, 128, 256, 256),
    down_block_types=("DownBlock3D",) * 3 + ("CrossAttnDownBlock3D",),
    up_block_types=("CrossAttnUpBlock3D",) + ("UpBlock3D",) * 3,
    attention_head_dim=16,
    cross_attention_dim=512,
)
TINY = dict(  # all kinds of blocks, with the fewest channels that the group norms allow
    block_out_channels=(8, 16),
    down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
    up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    layers_per_block=1,
    attention_head_dim=8,
    norm_num_groups=4,
    out_channels=3,
    cross_attention_dim=12,
)


def randomize(module, seed=0):
    """Sets random weights in place. None is zero, and layers keep the variance of activations."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.1 * noise + name.endswith("weight"))  # the scales of normalization layers are about 1
    return module


def job(settings, frames=16, size=32, words=77, batch=1, seed=1):
    """(video [B, T, h, w, C], timesteps [B], text [B, L, D]) of random numbers."""
    rng = np.random.default_rng(seed)
    video = rng.normal(size=(batch, frames, size, size, 4)).astype(np.float32)
    text = rng.normal(size=(batch, words, settings.get("cross_attention_dim", 1024))).astype(np.float32)
    return video, rng.integers(0, 1000, batch).astype(np.float32), text


def call(module, video, timesteps, text):
    """Calls the model of diffusers on arrays in our layout -> torch tensor [B, T, h, w, C]."""
    import torch

    video, timesteps, text = (torch.as_tensor(x) for x in (video, timesteps, text))
    return module(video.permute(0, 4, 1, 2, 3), timesteps, text).sample.permute(0, 2, 3, 4, 1)


def write(folder):
    """Writes a folder with random weights of the default size, 1.41 G parameters, in float16."""
    rng = np.random.default_rng(0)

    def draw(shape):
        x = rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:]))
        return x.astype(np.float16)

    shapes = naming.tensor_shapes(UNet3DConditionModel())
    tensors = {name: draw(shape) if len(shape) > 1 else np.ones(shape, np.float16) for name, shape in shapes.items()}
    huggingface.write(folder, {"_class_name": "UNet3DConditionModel"}, tensors)


if __name__ == "__main__":
    write(sys.argv[1])
