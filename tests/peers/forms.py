"""Times a residual block with the operations for CPUs (models/ops/cpu.py) against XLA's own operations, on this CPU.

    taskset -c 0 python -m tests.peers.forms [--rounds=15]

A call is the forward and backward pass of one ResidualBlock of the world_tiny denoiser with 8 clips, in float32. Both
sides take turns. The ratio is the median time of XLA's own operations over the median time of ours.
"""

import statistics
import time

import jax
import numpy as np
from absl import app, flags

from tests.helpers import init_weights
from vdm_jax.models import layers, ops

SHAPES = {"upper resolution": (8, 9, 8, 8, 48), "lower resolution": (8, 9, 4, 4, 112)}  # [B, T, h, w, C]
EMBEDDING = 128
WARM_UP = 3  # calls of each side that are not counted

ROUNDS = flags.DEFINE_integer("rounds", 15, "Calls of each side that are counted.", lower_bound=1)


def compiled(platform, block, params, *inputs):
    """The gradient of a loss of the block with respect to parameters and inputs, compiled with one table."""

    def loss(params, *inputs):
        return (block.apply({"params": params}, *inputs) ** 2).mean()

    with ops.backend(platform):
        return jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(params, *inputs).compile()


def main(_):
    jax.config.update("jax_platforms", "cpu")
    for name, shape in SHAPES.items():
        rng = np.random.default_rng(0)
        x, embedding = (rng.normal(size=size).astype(np.float32) for size in (shape, (*shape[:2], EMBEDDING)))
        block = layers.ResidualBlock(shape[-1])
        arguments = jax.device_put((init_weights(block, x, embedding), x, embedding))
        sides = {side: compiled(platform, block, *arguments) for side, platform in (("ours", "cpu"), ("XLA's", "tpu"))}
        times = {side: [] for side in sides}
        for _ in range(WARM_UP + ROUNDS.value):
            for side, call in sides.items():
                start = time.perf_counter()
                jax.block_until_ready(call(*arguments))
                times[side].append(1e3 * (time.perf_counter() - start))
        ours, xla = (statistics.median(ms[WARM_UP:]) for ms in times.values())
        print(f"{name} {list(shape)}: ours {ours:.1f} ms, XLA's {xla:.1f} ms, ratio {xla / ours:.2f}", flush=True)


if __name__ == "__main__":
    app.run(main)
