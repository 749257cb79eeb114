"""Shows what a recipe builds: every parameter with its shape, and the sizes of clips and latents.

    python -m vdm_jax.overview --config=configs/world_tiny.py [--stage=denoiser] [--chips=256]

With --chips it also shows how the recipe's mesh splits each parameter over that many devices, and a summary of this for
each rule in sharding.py.
"""

import math

import jax
from absl import flags

from vdm_jax import sharding
from vdm_jax.errors import UserError
from vdm_jax.run import cli
from vdm_jax.sharding import path_name
from vdm_jax.system import codec as stages
from vdm_jax.system.layout import STAGES


def main(argv):
    cli.only_options(argv)
    config = flags.FLAGS.config
    if config is None:
        raise UserError("--config=FILE is missing: name a recipe, such as configs/world_tiny.py")
    chosen = STAGES if flags.FLAGS.stage == "all" else (flags.FLAGS.stage,)
    size = stages.layout(config)
    mesh = sharding.mesh_shape(config.mesh, flags.FLAGS.chips) if flags.FLAGS.chips else None
    if mesh:
        print(f"mesh     {', '.join(f'{axis}={n}' for axis, n in mesh.items())}")
    print(f"clip     {size.frames} frames of {config.data.size}x{config.data.size}, {size.samples} samples of sound")
    for name, shape in stages.latent_shapes(size).items():
        print(f"latents  {name} {shape}, {size.latent_fps:g} latent frames a second")
    for stage, tree in stages.abstract_params(config).items():
        if stage not in chosen:
            continue
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        print(f"\n{stage}: {sum(math.prod(x.shape) for _, x in leaves) / 1e6:.3f} M parameters")
        for path, x in leaves:
            split = ""
            if mesh:
                spec = sharding.parameter_spec(path_name(path), x.shape, mesh)
                split = f"{' '.join(a or '-' for a in spec) or '-':<24} "
            print(f"  {math.prod(x.shape):>10,}  {str(x.shape):<24} {split}{path_name(path)}")
        for line in sharding.table(tree, mesh) if mesh else ():
            print(f"  {line}")


def define_flags():
    cli.define_config()
    flags.DEFINE_enum("stage", "all", ("all", *STAGES), "Stage to show.")
    flags.DEFINE_integer("chips", None, "Number of devices over which config.mesh splits parameters.", lower_bound=1)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
