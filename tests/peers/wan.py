"""Compares our AutoencoderKLWan with diffusers' at full size (126,892,531 parameters, random), on this CPU, in float32.

    python -m tests.peers.wan                                         # values of 17 frames of 64 x 64
    taskset -c 0,1 python -m tests.peers.wan --size=128 --rounds=5    # and times; both sides take turns
    python -m tests.peers.wan --memory                                # MiB of our programs for 17 and for 65 frames

A difference is relative to the largest value. The ratio is our median time over that of diffusers. Both sides have one
thread for each processor that `taskset` allows. The memory of a program is what it needs besides arguments and result.
"""

import functools
import os
import statistics
import time

import jax
import numpy as np
import torch
from absl import app, flags

from tests.peers import unet3d
from tests.peers.bench import PAUSE
from vdm_jax.models.published import naming
from vdm_jax.models.published.autoencoder_kl_wan import AutoencoderKLWan

FRAMES = flags.DEFINE_integer("frames", 17, "Frames of the clip: 1 + 4*n.", lower_bound=1)
SIZE = flags.DEFINE_integer("size", 64, "Height and width of the clip.", lower_bound=8)
MEMORY = flags.DEFINE_bool("memory", False, "Whether to print memory only.")
ROUNDS = flags.DEFINE_integer("rounds", 0, "Turns of each side that are timed.", lower_bound=0)


def build():
    """(our model, our parameters, the model of diffusers), with the same weights."""
    from diffusers import AutoencoderKLWan as Theirs

    theirs = unet3d.randomize(Theirs()).eval()
    with torch.no_grad():
        theirs.decoder.conv_out.weight *= 0.5  # so that few pixels are outside [-1, 1]
    model = AutoencoderKLWan()
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return model, jax.device_put(naming.to_params(tensors, model)), theirs


def calls_of(theirs):
    """{method: function of an array in our layout}"""

    def channels_first(x):
        return torch.as_tensor(np.array(x)).permute(0, 4, 1, 2, 3)

    def encode(video):
        return theirs.encode(channels_first(video)).latent_dist.mean.permute(0, 2, 3, 4, 1).numpy()

    def decode(z):
        return theirs.decode(channels_first(z)).sample.permute(0, 2, 3, 4, 1).numpy()

    return {"encode": encode, "decode": decode}


def timed(call, x):
    """Seconds of a call."""
    time.sleep(PAUSE)
    start = time.perf_counter()
    call(x)
    return time.perf_counter() - start


def at_once(model, method, params, x):
    out = model.apply({"params": params}, x, method=method)
    return out[0] if method == "encode" else out


def in_chunks(model, method, params, x):
    out = model.in_chunks(params, method, x)
    return out[0] if method == "encode" else out


def compile_for(run, model, method, params, x):
    """(the compiled program, MiB that it needs besides arguments and result)"""
    compiled = jax.jit(functools.partial(run, model, method)).lower(params, x).compile()
    return compiled, compiled.memory_analysis().temp_size_in_bytes / 2**20


def print_memory():
    model = AutoencoderKLWan()
    params, size = naming.param_shapes(model), SIZE.value
    for method in ("encode", "decode"):
        for run in (at_once, in_chunks):
            for frames in (17, 65):
                shape = (frames, size, size, 3) if method == "encode" else (1 + frames // 4, size // 8, size // 8, 16)
                x = jax.ShapeDtypeStruct((1, *shape), np.float32)
                memory = compile_for(run, model, method, params, x)[1]
                print(f"{method} {run.__name__}, {frames} frames: {memory:.0f} MiB", flush=True)


@torch.no_grad()
def main(_):
    jax.config.update("jax_platforms", "cpu")
    if MEMORY.value:
        return print_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model, params, theirs = build()
    theirs = calls_of(theirs)
    shape = (1, FRAMES.value, SIZE.value, SIZE.value, 3)
    x = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
    for method in ("encode", "decode"):
        ours, memory = compile_for(at_once, model, method, params, x)
        sides = {"ours": lambda x, ours=ours: np.asarray(ours(params, x)), "diffusers": theirs[method]}
        got, want = (call(x) for call in sides.values())
        difference = np.abs(got - want).max() / np.abs(want).max()
        print(f"{method} {list(x.shape)}: difference {difference:.1e}, memory {memory:.0f} MiB", flush=True)
        times = {name: [] for name in sides}
        for _ in range(ROUNDS.value):
            for name, call in sides.items():
                times[name].append(timed(call, x))
        if ROUNDS.value:
            ours, peer = (statistics.median(of) for of in times.values())
            print(f"{method}: ours {ours:.2f} s, diffusers {peer:.2f} s, ratio {ours / peer:.2f}", flush=True)
        x = want


if __name__ == "__main__":
    app.run(main)
