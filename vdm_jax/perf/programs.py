"""The three programs of a recipe that take its time: a train step, the sampler, and the encoders.

`bench` runs the programs on this machine. `dry_run` compiles the same programs for another machine.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import sharding, train_state
from vdm_jax.perf import flops


class Program(NamedTuple):
    """A jitted function and its arguments on a mesh. Nothing is compiled or computed yet."""

    lower: Callable  # lower(*arguments) -> jax.stages.Lowered; call it with the mesh set
    arguments: tuple  # the arguments as ShapeDtypeStructs with shardings
    init: Callable  # init() -> the arguments as arrays on the mesh; weights and clips are random
    count_flops: Callable  # count_flops() -> model FLOPs of one call, over all devices; call it with no mesh set
    params: int  # number of parameters
    rows: int  # training examples, prompts or clips in one call
    stateful: bool = False  # a call consumes its first argument, and the first result takes the argument's place


def train_step(system, name, mesh):
    """Returns the Program of one optimizer step of a stage, as `vdm_jax.train` runs it.

    system: a System.
    name: of the stage.
    mesh: of this machine's devices, or of a topology's devices. The batch must divide over the mesh.
    """
    stage = system.stages[name]
    config = system.config
    program = train_state.program(stage, config[name], jax.random.key(0), mesh, config.skip.loss_over_mean)
    others = (jax.random.key(1), stage.batch, stage.encoder_params)
    shardings = (
        sharding.replicated(mesh),
        sharding.batch_sharding(mesh),
        sharding.state_shardings(stage.encoder_params, mesh),
    )
    return Program(
        lower=program.step.lower,
        arguments=(program.abstract, *abstract(others, shardings)),
        init=lambda: (program.init(), *fill(others, shardings)),
        count_flops=lambda: flops.count(lambda *args: stage.loss(*args)[0], program.abstract["params"], *others)[1],
        params=count_parameters(program.abstract["params"]),
        rows=config[name].batch_size,
        stateful=True,
    )


def sampling(system, sampler, mesh, tokens):
    """Returns the Program that samples clips from text alone, decoding included, under the settings of config.sample.

    system: a System.
    sampler: a Sampler of that System.
    mesh: splits the parameters; all other arguments are whole on each device.
    tokens: of the prompts, int32 [B, L].
    """
    params = system.params | system.stages["denoiser"].encoder_params
    arrays, static = sampler.arguments(params)
    arguments = (
        params,
        jax.random.key(0),
        np.arange(len(tokens)),  # the number of each prompt
        tokens,
        arrays["clean"],
        arrays["masks"],
        arrays["levels"],
        arrays["weights"],
    )
    shardings = (sharding.state_shardings(params, mesh), *[sharding.replicated(mesh)] * (len(arguments) - 1))
    return Program(
        lower=lambda *args: sampler.program.lower(*args, **static),
        arguments=abstract(arguments, shardings),
        init=lambda: fill(arguments, shardings),
        count_flops=lambda: flops.count(lambda *args: sampler.program.__wrapped__(*args, **static), *arguments)[0],
        params=count_parameters(system.params["denoiser"]),
        rows=len(tokens),
    )


def encoding(system, mesh, rows):
    """Returns the Program that turns clips and captions into the latents and the text that the denoiser trains on.

    system: a System.
    mesh: splits parameters and clips. `rows` must divide over the mesh.
    rows: number of clips.
    """
    params = system.stages["denoiser"].encoder_params
    clips = system.stages["video_autoencoder"].batch
    clips = {name: x.update(shape=(rows, *x.shape[1:])) for name, x in clips.items()}

    def encode(params, clips):
        z = system.encode(params, clips["video"], clips["audio"])
        return z, system.encode_text(params, clips["tokens"])

    arguments = (params, clips)
    shardings = (sharding.state_shardings(params, mesh), sharding.batch_sharding(mesh))
    return Program(
        lower=jax.jit(encode).lower,
        arguments=abstract(arguments, shardings),
        init=lambda: fill(arguments, shardings),
        count_flops=lambda: flops.count(lambda *args: encode(*args), *arguments)[0],
        params=count_parameters(params),
        rows=rows,
    )


def abstract(arguments, shardings):
    """Returns the arguments as ShapeDtypeStructs with shardings.

    arguments: a tuple of trees of arrays, numbers and ShapeDtypeStructs.
    shardings: a tuple with one sharding for each argument, or one tree of shardings for each argument.
    """
    shapes = jax.eval_shape(lambda *args: args, *arguments)

    def place(where, tree):
        return jax.tree.map(lambda x: x.update(sharding=where), tree)

    return jax.tree.map(place, shardings, shapes)


def fill(arguments, shardings):
    """Returns the arguments as arrays on devices, with small random values in place of ShapeDtypeStructs.

    arguments, shardings: as `abstract` takes them. Booleans become True, and whole numbers become 0.
    """
    rng = np.random.default_rng(0)

    def draw(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jnp.floating):
            return (0.1 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)
        return np.ones(x.shape, x.dtype) if x.dtype == bool else np.zeros(x.shape, x.dtype)

    return jax.device_put(jax.tree.map(draw, arguments), shardings)


def count_parameters(tree):
    """Returns the number of parameters in a tree of arrays or ShapeDtypeStructs."""
    return sum(x.size for x in jax.tree.leaves(tree))
