"""Compares our AutoencoderKLWan with diffusers' at full size (126,892,531 parameters, random), on this CPU, in float32.

    python -m tests.peers.wan                                       # values of 17 frames of 64 x 64
    taskset -c 0 python -m tests.peers.wan --size=128 --rounds=5    # and times; both sides take turns
    python -m tests.peers.wan --memory                              # MiB of our programs for 17 and for 65 frames

A difference is relative to the largest value. Both sides have one thread for each processor that `taskset` allows. A
time is the median over the turns. Processor time leaves out what other processes use. A ratio is our time over that of
diffusers. The memory of a program is what it needs besides arguments and result.
"""

import functools
import os
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
ROUNDS = flags.DEFINE_integer("rounds", 1, "Turns of each side.", lower_bound=1)


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
    """-> (result, (seconds, seconds of processor time))"""
    time.sleep(PAUSE)
    start = time.perf_counter(), time.process_time()
    out = call(x)
    return out, (time.perf_counter() - start[0], time.process_time() - start[1])


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
        run, memory = compile_for(at_once, model, method, params, x)
        sides = {"ours": lambda x, run=run: np.asarray(run(params, x)), "diffusers": theirs[method]}
        results, times = {}, {name: [] for name in sides}
        for _ in range(ROUNDS.value):
            for name, call in sides.items():
                results[name], seconds = timed(call, x)
                times[name].append(seconds)
        got, want = results.values()
        difference = np.abs(got - want).max() / np.abs(want).max()
        print(f"{method} {list(x.shape)}: difference {difference:.1e}, memory {memory:.0f} MiB")
        for what, ours, peer in zip(("time", "processor time"), *(np.median(of, 0) for of in times.values())):
            print(f"{what}: ours {ours:.2f} s, diffusers {peer:.2f} s, ratio {ours / peer:.2f}", flush=True)
        x = want


if __name__ == "__main__":
    app.run(main)
