"""The three programs of a recipe that take its time: a train step, the sampler, and the encoders.

`bench` runs the programs on this machine. `dry_run` compiles the same programs for another machine.
"""

import functools
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
    """Returns the Program of one optimizer step of stage `name`, as `vdm_jax.train` runs it.

    mesh: the batch must divide over it.
    """
    stage, config = system.stages[name], system.config
    program = train_state.program(stage, config[name], jax.random.key(0), mesh, config.skip.loss_over_mean)
    others = (jax.random.key(1), stage.batch, stage.encoder_shapes)
    shardings = (
        sharding.replicated(mesh),
        sharding.batch_sharding(mesh),
        sharding.state_shardings(stage.encoder_shapes, mesh),
    )
    return Program(
        lower=program.step.lower,
        arguments=(program.abstract, *_abstract(others, shardings)),
        init=lambda: (program.init(), *fill(others, shardings)),
        count_flops=lambda: flops.count(lambda *args: stage.loss(*args)[0], program.abstract["params"], *others)[1],
        params=count_parameters(program.abstract["params"]),
        rows=config[name].batch_size,
        stateful=True,
    )


def sampling(system, sampler, mesh, rows):
    """Returns the Program that samples clips from text alone, decoding included, under the settings of config.sample.

    sampler: a Sampler of the System.
    mesh: splits the parameters; all other arguments are whole on each device.
    rows: number of prompts.
    """
    params = system.param_shapes | {"statistics": system.stages["denoiser"].encoder_shapes["statistics"]}
    arrays, static = sampler.arguments(params)
    tokens = np.zeros((rows, system.config.data.text_length), np.int32)
    arrays = [arrays[name] for name in ("clean", "control", "memory", "masks", "levels", "weights")]
    arguments = (params, jax.random.key(0), np.arange(rows), tokens, *arrays)
    shardings = (sharding.state_shardings(params, mesh), *[sharding.replicated(mesh)] * (len(arguments) - 1))
    lower, function = (functools.partial(f, **static) for f in (sampler.program.lower, sampler.program.__wrapped__))
    return _without_gradient(lower, function, arguments, shardings, system.param_shapes["denoiser"], rows)


def encoding(system, mesh, rows):
    """Returns the Program that turns clips and captions into the latents and the text that the denoiser trains on.

    mesh: splits parameters and clips.
    rows: number of clips, which must divide over the mesh.
    """
    encoders = system.stages["denoiser"].encoder_shapes
    params = {name: encoders[name] for name in encoders if name not in ("teacher", "base")}
    clips = system.stages["video_autoencoder"].batch
    clips = {name: clips[name].update(shape=(rows, *clips[name].shape[1:])) for name in ("video", "audio", "tokens")}

    def encode(params, clips):
        z = system.encode(params, clips["video"], clips["audio"])
        return z, system.encode_text(params, clips["tokens"])

    shardings = (sharding.state_shardings(params, mesh), sharding.batch_sharding(mesh))
    return _without_gradient(jax.jit(encode).lower, encode, (params, clips), shardings, params, rows)


def _without_gradient(lower, function, arguments, shardings, params, rows):
    return Program(
        lower=lower,
        arguments=_abstract(arguments, shardings),
        init=lambda: fill(arguments, shardings),
        count_flops=lambda: flops.count(lambda *args: function(*args), *arguments)[0],
        params=count_parameters(params),
        rows=rows,
    )


def _abstract(arguments, shardings):
    """Returns the arguments as ShapeDtypeStructs with shardings; see `fill`."""

    def place(where, tree):
        return jax.tree.map(lambda x: x.update(sharding=where), tree)

    return jax.tree.map(place, shardings, jax.eval_shape(lambda *args: args, *arguments))


def fill(arguments, shardings):
    """Returns the arguments as arrays on devices. ShapeDtypeStructs become small random numbers, True or whole 0.

    arguments: a tuple of trees of arrays, numbers and ShapeDtypeStructs.
    shardings: a tuple with one sharding, or one tree of shardings, for each argument.
    """
    rng = np.random.default_rng(0)

    def draw(x):
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        if jnp.issubdtype(x.dtype, jnp.floating):
            return (0.1 * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)
        return np.full(x.shape, x.dtype == bool, x.dtype)

    return jax.device_put(jax.tree.map(draw, arguments), shardings)


def count_parameters(tree):
    """Returns the number of parameters in a tree of arrays or ShapeDtypeStructs."""
    return sum(x.size for x in jax.tree.leaves(tree))
