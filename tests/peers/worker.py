"""Times one denoiser in a process of its own.

    python -m tests.peers.worker ours float32 cpu [FOLDER]     # or diffusers, lucidrains; or bfloat16; or gpu

With FOLDER, ours and diffusers read a UNet3DConditionModel from there, for forward passes only. The first line on
stdout is the number of parameters and the largest memory until then, as JSON. Each line on stdin names what to run and
the number of clips: 'forward 1' or 'step 1'. The answer is one line of JSON on stdout.

The PyTorch models run in evaluation mode, also in a training step: they have no dropout, and both sides compute the
same. On a GPU they are compiled, with channels last. The input is on the device before the time starts.
"""

import functools
import importlib.util
import json
import resource
import sys
import time
from unittest.mock import MagicMock

from tests.peers import unet3d
from vdm_jax.run import huggingface

THREADS = 2


def diffusers(folder):
    from diffusers import UNet3DConditionModel

    if folder:
        return UNet3DConditionModel.from_pretrained(folder).float(), unet3d.call
    return UNet3DConditionModel(**unet3d.SETTINGS), unet3d.call


def lucidrains(folder):
    """video-diffusion-pytorch (arXiv:2204.03458): pooled text, and attention at all resolutions."""
    if importlib.util.find_spec("torchvision") is None:  # the package imports it to read images; not needed here
        sys.modules.update({name: MagicMock() for name in ("torchvision", "torchvision.transforms")})
    from video_diffusion_pytorch import Unet3D

    width = unet3d.SETTINGS["cross_attention_dim"]
    model = Unet3D(dim=64, dim_mults=(1, 2, 4, 4), channels=4, cond_dim=width, attn_heads=8, attn_dim_head=32)

    def call(model, video, timesteps, text):
        out = model(video.permute(0, 4, 1, 2, 3), timesteps, cond=text.mean(1), null_cond_prob=0.0)
        return out.permute(0, 2, 3, 4, 1)

    return model, call


class Torch:
    def __init__(self, make, dtype, device, folder):
        import torch

        self.torch, self.gpu = torch, device == "gpu"
        self.device = "cuda" if self.gpu else "cpu"
        torch.manual_seed(0)
        torch.set_num_threads(THREADS)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as XLA does
        self.model, self.call = make(folder)
        self.model.eval().to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-4)
        self.params = sum(p.numel() for p in self.model.parameters())
        self.run = self.model
        if self.gpu:
            for p in self.model.parameters():  # the format is for 4 dimensions; kernels over time have 5
                p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
            self.run = torch.compile(self.model)
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=dtype == "bfloat16")

    def place(self, job):
        return [self.torch.as_tensor(x, device=self.device) for x in job]

    def prepare(self, what, job):
        from torch.utils.flop_counter import FlopCounterMode

        compiled, self.run = self.run, self.model
        with FlopCounterMode(display=False) as counter:
            getattr(self, what)(*job)
        self.run = compiled
        if self.gpu:
            getattr(self, what)(*job)  # compiles
        return {"gflop": counter.get_total_flops() / 1e9}

    def wait(self):
        if self.gpu:
            self.torch.cuda.synchronize()

    def forward(self, *job):
        with self.torch.no_grad(), self.autocast:
            self.call(self.run, *job)
        self.wait()

    def step(self, video, timesteps, text):
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            loss = (self.call(self.run, video, timesteps, text) - video).square().mean()
        loss.backward()
        self.optimizer.step()
        self.wait()


class Ours:
    """Our UNet3DConditionModel. A training step takes over the memory of the last state."""

    def __init__(self, dtype, device, folder):
        import jax
        import jax.numpy as jnp
        import optax
        from etils import epath

        from tests.helpers import weights
        from vdm_jax import sharding
        from vdm_jax.models import ops
        from vdm_jax.models.published import naming
        from vdm_jax.models.published.unet3d_condition import UNet3DConditionModel
        from vdm_jax.perf import flops
        from vdm_jax.run import huggingface
        from vdm_jax.system import parts

        jax.config.update("jax_platforms", "cuda" if device == "gpu" else "cpu")
        optimizer = optax.adam(1e-4)
        if folder:
            config = huggingface.read_config(folder)[1]
            model = naming.from_config(UNet3DConditionModel, config, folder, dtype=jnp.dtype(dtype))
            mesh = sharding.make_mesh(dict(data=1, fsdp=1, sequence=1, tensor=1), jax.devices()[:1])
            params = parts.Published(epath.Path(folder), model).read(mesh)
            self.state = params, ()
        else:
            model = UNet3DConditionModel(**unet3d.SETTINGS, dtype=jnp.dtype(dtype))
            params = weights(naming.param_shapes(model))
            self.state = jax.device_put((params, optimizer.init(params)))
        abstract = jax.eval_shape(lambda: params)
        self.params = sum(leaf.size for leaf in jax.tree.leaves(params))

        def forward(state, video, timesteps, text):
            return model.apply({"params": state[0]}, video, timesteps, text)

        def loss(params, video, *rest):
            return ((forward((params,), video, *rest) - video) ** 2).mean()

        def count(what, job):
            with ops.backend("gpu"):  # the FLOPs that the model needs, without those that the forms for CPUs add
                return flops.count(loss, abstract, *job)[what == "step"]

        def step(state, *job):
            params, moments = state
            value, gradient = jax.value_and_grad(loss)(params, *job)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), value

        self.jitted = {"forward": jax.jit(forward), "step": jax.jit(step, donate_argnums=0)}
        self.compiled, self.wait, self.count, self.place = {}, jax.block_until_ready, count, jax.device_put

    def prepare(self, what, job):
        start = time.perf_counter()
        self.compiled[what] = self.jitted[what].lower(self.state, *job).compile()
        return {"compile_seconds": time.perf_counter() - start, "gflop": self.count(what, job) / 1e9}

    def forward(self, *job):
        self.wait(self.compiled["forward"](self.state, *job))

    def step(self, *job):
        self.state, loss = self.wait(self.compiled["step"](self.state, *job))


SIDES = {
    "ours": Ours,
    "diffusers": functools.partial(Torch, diffusers),
    "lucidrains": functools.partial(Torch, lucidrains),
}


def main():
    name, dtype, device, folder = (*sys.argv[1:], None)[:4]
    side, prepared = SIDES[name](dtype=dtype, device=device, folder=folder), {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"params": side.params, "peak_bytes": peak}), flush=True)
    settings = huggingface.read_config(folder)[1] if folder else unet3d.SETTINGS
    for line in sys.stdin:
        what, batch = line.split()
        job = side.place(unet3d.job(settings, batch=int(batch)))
        if line not in prepared:
            prepared[line] = side.prepare(what, job)
        start = time.perf_counter()
        getattr(side, what)(*job)
        ms = (time.perf_counter() - start) * 1e3
        print(json.dumps({"ms": ms, **prepared[line]}), flush=True)


if __name__ == "__main__":
    main()
