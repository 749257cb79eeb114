"""A System: the four models of a config, and what each stage trains. `build(config)` makes one."""

import dataclasses

from vdm_jax import sharding
from vdm_jax.system.codec import Codec, make_models
from vdm_jax.system.layout import layout
from vdm_jax.system.losses import make_stages


@dataclasses.dataclass(frozen=True, eq=False)
class System(Codec):
    """All models of a config with their conversions (a Codec), and the stages that train the models."""

    stages: dict  # {name: losses.Stage}

    @property
    def param_shapes(self):
        """The shapes of the parameters of every stage, {stage: tree of ShapeDtypeStruct}."""
        return {name: stage.param_shapes for name, stage in self.stages.items()}

    def check_mesh(self, mesh, names):
        """Raises UserError where the mesh does not divide models or activations of the stages `names`."""
        for name in names:
            stage = self.stages[name]
            sharding.check_axes(mesh, stage.param_shapes, name, stage.activation_shape)

    def check_batch(self, mesh, name):
        """Raises UserError where the batch of stage `name` does not divide over the mesh."""
        settings = self.config[name]
        sharding.check_batch(
            settings.batch_size,
            mesh,
            settings.accumulate,
            self.stages[name].clips_per_negative,
            f"{name}.hard_negatives.every",
        )


def build(config):
    """The System of a config. Raises UserError where settings do not fit together, or where there is no device."""
    sharding.find_devices()
    sizes = layout(config)
    codec = Codec(config, sizes, make_models(config, sizes))
    return System(codec.config, codec.layout, codec.models, make_stages(codec))
