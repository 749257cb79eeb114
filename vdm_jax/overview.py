"""Shows what a recipe builds: every parameter with its shape, and the sizes of clips and latents.

python -m vdm_jax.overview --config=configs/world_tiny.py [--stage=denoiser]
"""

import math

import jax
from absl import flags

from vdm_jax import checkpoint, cli, stages
from vdm_jax.errors import UserError
from vdm_jax.sharding import path_name


def main(argv):
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config=FILE is missing")
    chosen = checkpoint.STAGES if flags.FLAGS.stage == "all" else (flags.FLAGS.stage,)
    size = stages.layout(config)
    print(f"clip     {size.frames} frames of {config.data.size}x{config.data.size}, {size.samples} samples of sound")
    for name, shape in stages.latent_shapes(size).items():
        print(f"latents  {name} {shape}, {size.latent_fps:g} latent frames a second")
    for stage, tree in stages.abstract_params(config).items():
        if stage not in chosen:
            continue
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        print(f"\n{stage}: {sum(math.prod(x.shape) for _, x in leaves) / 1e6:.3f} M parameters")
        for path, x in leaves:
            print(f"  {math.prod(x.shape):>10,}  {str(x.shape):<24} {path_name(path)}")


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_enum("stage", "all", ("all", *checkpoint.STAGES), "Stage to show.")
    cli.run(main)
