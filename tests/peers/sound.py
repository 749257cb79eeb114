"""Trains the audio autoencoder of a recipe for a budget of FLOPs, and measures it beside Opus on held-out windows.

    python -m tests.peers.sound --config=configs/doom.py --recorded=doom.npz [--teraflops=2.5 --clips=1024 --count=64]
        [--kilobits=12 --batch=4 --config.audio_autoencoder.model.groups=8 ...]

Recipes are compared at equal FLOPs of the model, so neither other work on the machine nor the form of a layer on it
counts. The learning rate falls to zero at the end of the budget. The sounds of `clips` training clips and `count`
held-out clips are recorded to the file once, and read from there by later calls.
"""

import os
import time

import jax
import numpy as np
from absl import flags

from tests.peers import opus
from vdm_jax import train_state
from vdm_jax.data import batches
from vdm_jax.metrics import reconstruction, sound
from vdm_jax.models import ops
from vdm_jax.perf import flops
from vdm_jax.run import cli
from vdm_jax.system import build

STAGE = "audio_autoencoder"
SCALE = 32767  # of 16-bit samples


def recorded(config, path, counts):
    """Returns {split: float32 [P, N]} of a file, which is written first where it is missing. counts: {split: P}."""
    if not os.path.exists(path):
        made = {}
        for split, count in counts.items():
            source = batches.source(config, split)
            made[split] = np.stack([np.rint(source[i]["audio"] * SCALE).astype(np.int16) for i in range(count)])
        np.savez(path, **made)
    with np.load(path, allow_pickle=False) as file:
        return {split: file[split].astype(np.float32) / SCALE for split in counts}


def step_flops(system):
    """FLOPs of the network in a training step."""
    stage = system.stages[STAGE]
    audio = jax.eval_shape(system.pad_audio, stage.batch["audio"])

    def output(params, audio, key):
        return system.models[STAGE].apply({"params": params}, audio, key)[0]

    with ops.backend("gpu"):
        return flops.count(output, stage.param_shapes, audio, jax.random.key(0))[1]


def trained(system, clips, steps):
    """Returns the averaged parameters after so many steps."""
    stage, settings = system.stages[STAGE], system.config[STAGE]
    state = train_state.create(jax.jit(stage.init)(jax.random.key(0)), settings)
    step = jax.jit(train_state.make_step(stage.loss, settings), donate_argnums=0)
    rng, rows = np.random.default_rng(0), np.zeros(0, int)
    for number in range(steps):
        if len(rows) < settings.batch_size:
            rows = np.concatenate([rows, rng.permutation(len(clips))])
        batch, rows = rows[: settings.batch_size], rows[settings.batch_size :]
        state, metrics = step(state, jax.random.key(1), {"audio": clips[batch]}, {})
        if number % max(1, steps // 20) == 0:
            shown = ", ".join(f"{name} {float(metrics[name]):.3f}" for name in ("loss", "wave", "kl"))
            print(f"step {number}: {shown}", flush=True)
    return state["ema"]


def reconstructed(system, params, clips, rows=8):
    """Returns clips [P, N] encoded and decoded."""
    run = jax.jit(lambda params, audio: system.reconstruct(STAGE, {STAGE: params}, audio))
    return np.concatenate([np.asarray(run(params, clips[i : i + rows])) for i in range(0, len(clips), rows)])


def show(name, truth, found, fps, sample_rate):
    metrics = sound.measure(truth, found, fps, sample_rate)
    ratios = reconstruction.si_sdr(truth, found)
    metrics["si_sdr"] = float(np.median(ratios[~np.isnan(ratios)]))
    print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in metrics.items() if value is not None))


def main(argv):
    options, config = flags.FLAGS, cli.recipe(argv)
    with config.unlocked():
        config[STAGE].batch_size = options.batch
    data, system = config.data, build(config)
    needed = step_flops(system)
    with config.unlocked():
        config[STAGE].steps = max(1, round(1e12 * options.teraflops / needed))
    clips = recorded(config, options.recorded, {"train": options.clips, "held_out": options.count})
    truth = clips["held_out"]
    began = time.process_time()
    params = trained(system, clips["train"], config[STAGE].steps)
    seconds, number = time.process_time() - began, sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{number:,} parameters, {config[STAGE].steps} steps of {needed / 1e9:.2f} GFLOP, {seconds:.0f} s of processor"
    )
    show("autoencoder", truth, reconstructed(system, params, truth), data.fps, data.sample_rate)
    decoded = np.stack([opus.through_opus(x, data.sample_rate, 1000 * options.kilobits)[0] for x in truth])
    show(f"Opus, {options.kilobits} kbit/s", truth, decoded, data.fps, data.sample_rate)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("recorded", None, "File of the recorded sounds, .npz.", required=True)
    flags.DEFINE_float("teraflops", 2.5, "FLOPs of the network in the whole training, in 10^12.", 0)
    flags.DEFINE_integer("batch", 4, "Clips of a step.", 1)
    flags.DEFINE_integer("clips", 1024, "Training clips.", 1)
    flags.DEFINE_integer("count", 64, "Held-out windows.", 1)
    flags.DEFINE_integer("kilobits", 12, "Rate of Opus, in kbit/s.", 6, 510)
    cli.run(main)
