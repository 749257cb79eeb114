"""Times our UNet3DConditionModel and a PyTorch denoiser. Both take turns, so that a change of the machine affects both.

    python -m tests.peers.bench --peer=diffusers [--rounds=5 --batch=1 --dtype=float32 --device=cpu --out=peers.json]
    python -m tests.peers.unet3d FOLDER && python -m tests.peers.bench --weights=FOLDER --batch=2 --rounds=2

The input is latent clips [B, 16, 32, 32, 4] with text [B, 77, 512]. `forward` is a pass without gradients. `step` is
forward pass, backward pass and Adam. With --device=gpu both run on a CUDA GPU, and the PyTorch model is compiled by
torch.compile, with channels last. With --dtype=bfloat16 both compute products in bfloat16 (PyTorch by autocast) and
keep float32 parameters.

The second line is for a model of ModelScope's size, whose random weights are first written to FOLDER. Both sides read
them. A forward pass of two clips is one step of sampling with guidance.

`diffusers` is UNet3DConditionModel with the same parameters as ours. `lucidrains` is video-diffusion-pytorch (pip
install video-diffusion-pytorch), with the same widths. It is another network, so compare its rate in GFLOP/s, not its
time. A rate counts the FLOPs that the model needs; a step includes its backward pass.
"""

import json
import os
import statistics
import subprocess
import sys
import time

from absl import flags
from etils import epath

from vdm_jax.errors import UserError
from vdm_jax.run import cli

PAUSE = 0.3  # seconds between turns, until the threads of the last turn sleep
WARM_UP = 2  # turns that are not counted
# Both processes keep their memory from step to step and use large pages. Thus no time goes into requests for memory.
# With several arenas, memory would go back to the system after a step, and a virtual machine would have to request it
# from its host again.
_MALLOC = dict(mmap_max=0, trim_threshold=1 << 36, hugetlb=1, arena_max=1)
MALLOC = ":".join(f"glibc.malloc.{key}={value}" for key, value in _MALLOC.items())


class Side:
    """A worker process."""

    def __init__(self, name, dtype, device, folder):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.peers.worker", name, dtype, device, *filter(None, [folder])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "GLIBC_TUNABLES": MALLOC,
                "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            },  # two processes share one GPU
        )
        self.size = self.read()  # {"params", "peak_bytes"}

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise UserError('a worker has ended, see above; PyTorch and diffusers: pip install -e ".[peers]"')
        return json.loads(line)

    def run(self, what, batch):
        self.process.stdin.write(f"{what} {batch}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def by_turns(sides, what, batch, rounds):
    """{side: {"median", "min", "max" of its times in ms, and the other figures that it reports}}."""
    figures, times = {}, {name: [] for name in sides}
    for _ in range(WARM_UP + rounds):
        for name, side in sides.items():
            time.sleep(PAUSE)
            answer = side.run(what, batch)
            times[name].append(answer.pop("ms"))
            figures[name] = answer
    for name, ms in times.items():
        ms = ms[WARM_UP:]
        figures[name].update(median=statistics.median(ms), min=min(ms), max=max(ms))
    return figures


def main(argv):
    options = flags.FLAGS
    cli.only_options(argv)
    sides = {name: Side(name, options.dtype, options.device, options.weights) for name in ("ours", options.peer)}
    result = {"peer": options.peer, "batch": options.batch, "rounds": options.rounds, "dtype": options.dtype}
    result["device"] = options.device
    result["params"] = {name: side.size["params"] for name, side in sides.items()}
    for name, side in sides.items():
        print(
            f"{name}: {side.size['params'] / 1e6:.2f} M parameters; {side.size['peak_bytes'] / 1e9:.1f} GB at the start"
        )
    print(f"{'':<20} {'median ms':>10} {'min':>8} {'max':>8} {'GFLOP/s':>8}")
    for what in ("forward",) if options.weights else ("forward", "step"):
        figures = by_turns(sides, what, options.batch, options.rounds)
        for name, row in figures.items():
            row["gflop_per_s"] = 1e3 * row["gflop"] / row["median"]
            shown = [f"{row[key]:8.1f}" for key in ("min", "max", "gflop_per_s")]
            print(f"{what:<8} {name:<11} {row['median']:10.1f} {' '.join(shown)}")
        ratio, rates = (figures["ours"][key] / figures[options.peer][key] for key in ("median", "gflop_per_s"))
        compiled = figures["ours"]["compile_seconds"]
        print(f"{what:<8} {'ratio':<11} {ratio:10.2f} {rates:26.2f}   ours compiled in {compiled:.0f} s", flush=True)
        result[what] = {**figures, "ratio": ratio, "ratio_of_gflop_per_s": rates}
    for side in sides.values():
        side.close()
    if options.out:
        epath.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


def define_flags():
    flags.DEFINE_enum("peer", "diffusers", ("diffusers", "lucidrains"), "The PyTorch model.")
    flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Type in which products are computed.")
    flags.DEFINE_enum("device", "cpu", ("cpu", "gpu"), "Where both models run.")
    flags.DEFINE_integer("rounds", 5, "Turns of each side that are counted.", lower_bound=1)
    flags.DEFINE_integer("batch", 1, "Clips in a batch.", lower_bound=1)
    flags.DEFINE_string("weights", None, "Folder with a published UNet3DConditionModel, for forward passes alone.")
    flags.DEFINE_string("out", None, "JSON file to write.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
