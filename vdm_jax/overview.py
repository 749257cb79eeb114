"""Shows what a recipe builds: the sizes of clips and latents, and each parameter with its shape.

    python -m vdm_jax.overview --config=configs/world_tiny.py [--stage=denoiser] [--chips=256]

--chips=N also shows how the recipe's mesh splits each parameter over N devices. A table for each stage sums up the
parameters that match each rule of sharding.PARAMETER_RULES.
"""

from absl import flags

from vdm_jax import sharding
from vdm_jax.run import cli
from vdm_jax.system import build
from vdm_jax.system.layout import STAGES


def main(argv):
    options = flags.FLAGS
    config = cli.recipe(argv)
    system = build(config)
    names = system.stages if options.stage == "all" else (options.stage,)
    for name in names:
        system.check_stage(name)
    mesh = sharding.mesh_shape(config.mesh, options.chips) if options.chips else None
    layout, (height, width) = system.layout, config.data.size
    if mesh:
        print(f"mesh     {', '.join(f'{axis}={n}' for axis, n in mesh.items())}")
    print(f"clip     {layout.frames} frames of {height}x{width}, {layout.samples} samples of sound")
    for name, shape in layout.latent_shapes.items():
        print(f"latents  {name} {shape}, {layout.latent_fps:g} latent frames a second")
    for name in names:
        show_parameters(name, system.stages[name].param_shapes, mesh)


def show_parameters(name, params, mesh):
    """Prints each parameter of a stage: its size, shape, split and path. mesh: {axis: size}, or None for no split."""
    leaves = sharding.named_leaves(params)
    print(f"\n{name}: {sum(x.size for x in leaves.values()) / 1e6:.3f} M parameters")
    for path, x in leaves.items():
        spec = sharding.parameter_spec(path, x.shape, mesh) if mesh else ()
        split = f"{' '.join(axis or '-' for axis in spec) or '-':<24} " if mesh else ""
        print(f"  {x.size:>10,}  {str(x.shape):<24} {split}{path}")
    for line in sharding.table(params, mesh) if mesh else ():
        print(f"  {line}")


def define_flags():
    cli.define_config()
    flags.DEFINE_enum("stage", "all", ("all", *STAGES), "Stage to show.")
    flags.DEFINE_integer("chips", None, "Number of devices that config.mesh splits parameters over.", 1, 2**20)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
