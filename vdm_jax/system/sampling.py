"""Makes clips from prompts, context frames and a scheduling matrix, in one compiled program."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from vdm_jax import samplers, sharding, tasks
from vdm_jax.diffusion import add_noise, broadcast_to_latent
from vdm_jax.errors import UserError, one_of
from vdm_jax.run import hosts, profiling
from vdm_jax.run.progress import progress
from vdm_jax.settings import check
from vdm_jax.sharding import constrain
from vdm_jax.system import distillation
from vdm_jax.system import memory as scenes

BATCH = 8  # prompts sampled at once


class Sampler:
    """Samples with the models of a System; compiles `program` once for each shape and each set of static arguments.

    If a mesh is set, its axes `data` and `fsdp` split the work by clips. In the end every process gets all clips.
    """

    def __init__(self, system):
        if system.published:
            raise UserError("only the command `sample` samples the denoiser of denoiser.source")
        self.system = system
        static = ("method", "interval", "guides", "history_noise")
        self.program = jax.jit(functools.partial(sample, system), static_argnames=static)
        self._compiled = {}  # {shapes and static arguments: compiled program}
        self._encode = jax.jit(lambda params, v, a: sharding.replicate(system.encode(params, v, a)))

    def __call__(self, params, prompts, **arguments):
        """-> (video uint8 [P, F, H, W, 3], audio float32 [P, N]) for P prompts, as NumPy arrays; see `window`."""
        return self.window(params, prompts, **arguments)[:2]

    def window(
        self, params, prompts, *, seed=0, window=0, frames=None, context=None, control=None, memory=None, **options
    ):
        """-> (video uint8 [P, F, H, W, 3], audio float32 [P, N], memory) for P prompts, as NumPy arrays.

        Prompt i draws its noise from (seed, window, i), whatever the batch.

        window: index of the window in a long clip, from 0.
        frames: video frames, 1 + f_t * n; None: as in training.
        context: tasks.Context of clips of that length; None: no context. Context frames in the result are the
            autoencoder's reconstruction, not the original pixels.
        control: buttons held in each frame, float [P or 1, F, A]; None: not known. Not for a denoiser without control.
        memory: of the P scenes, as the window before has returned it; None: it is empty. {} for a denoiser without one.
        options: settings of config.sample (steps, method, guidance, ...); None leaves a setting as it is.
        Raises UserError where these do not fit.
        """
        arrays, static = self.arguments(params, frames=frames, context=context, control=control, **options)
        arrays["memory"] = memory or {}
        per_clip = {name: arrays.pop(name) for name in ("clean", "control", "memory")}
        tokens = self.system.tokenize(prompts)
        key = jax.random.fold_in(jax.random.key(seed), window)
        batch = min(BATCH, len(prompts))

        def rows(start):
            # The last prompt is repeated until the last batch is full.
            numbers = np.minimum(np.arange(start, start + batch), len(prompts) - 1)
            own = jax.tree.map(lambda x: x[numbers] if len(x) > 1 else x, per_clip)
            return dict(key=key, numbers=numbers, tokens=tokens[numbers], **own, **arrays)

        program = self._compile(params, rows(0), static)
        made = []
        with progress("sampling", len(prompts), "clip") as advance:
            for start in range(0, len(prompts), batch):
                made.append(jax.tree.map(np.asarray, program(params, **rows(start))))
                advance(min(batch, len(prompts) - start))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(prompts)], *made)

    @property
    def compilations(self):
        """The number of programs that were compiled so far."""
        return len(self._compiled)

    def _compile(self, params, arrays, static):
        """`program`, compiled for these shapes and static arguments, or the compiled program of an earlier call."""
        shapes = [(np.shape(x), getattr(x, "sharding", None)) for x in jax.tree.leaves((params, arrays))]
        kind = (jax.sharding.get_abstract_mesh(), *shapes, *static.values())
        if kind not in self._compiled:
            clips = len(arrays["numbers"])
            rows, latent_frames = arrays["levels"]["video"].shape
            frames = 1 + self.system.layout.f_t * (latent_frames - 1)
            what = f"the sampler, {clips} clip(s) of {frames} frames in {rows - 1} steps"
            parameter_count = sum(x.size for x in jax.tree.leaves(params))
            with profiling.compiling(what, key=f"{static['method']} {static['guides']} {parameter_count}"):
                self._compiled[kind] = hosts.compiled(self.program, params, **arrays, **static)
        return self._compiled[kind]

    def arguments(self, params, *, frames=None, context=None, control=None, **options):
        """-> (arrays, static arguments) of `program`, except params, key, numbers and tokens. Raises UserError."""
        system = self.system
        layout = system.layout if frames is None else system.layout.with_frames(frames)
        settings = resolve(system.config.sample, options)
        context = context or tasks.text(layout)  # the task `text`, where no frame is context
        masks, clean = context.masks, self._context_latents(params, context, layout)
        guidance = settings["guidance"]
        given = any(mask.all() for mask in masks.values())  # the whole of one modality is context
        # A clip is continued if the first two latent frames are context. One would not show the motion.
        continued = not given and all(mask[:2].all() for mask in masks.values())
        text_weight = guidance["text_continue" if continued else "text_cross_modal" if given else "text"]
        weights = {"text": text_weight, "history": guidance["history"], "modality": guidance["modality"]}
        weights = {name: float(weight) for name, weight in {**weights, "rescale": settings["rescale"]}.items()}
        levels = tasks.scheduling_matrix(
            settings["steps"],
            layout.latent_frames,
            system.config.denoiser.diffusion,
            masks,
            # The context of a continued clip almost determines the next frames. So their first step may remove most of
            # the noise: generated frame i goes from time 1 to first_step_times[i].
            first_step_times=settings["first_step_times"] if continued else (),
            **{name: settings[name] for name in ("lag", "spacing", "context_noise")},
        )
        cond = system.unknown_control(layout.latent_frames)
        if control is not None:
            if not cond or control.ndim != 3 or control.shape[1:] != (layout.frames, layout.control):
                raise UserError(f"control of shape {control.shape} does not fit {layout.frames} frames")
            cond = {"control": system.pool_control(control)}
        arrays = dict(clean=clean, control=jax.device_get(cond), memory={}, masks=masks, levels=levels, weights=weights)
        has_context = any(mask.any() for mask in masks.values())
        return arrays, dict(
            method=settings["method"],
            interval=tuple(settings["interval"]),
            # Each guidance makes every network call larger, so those that add nothing are left out.
            guides=(text_weight != 1, has_context and guidance["history"] != 1, guidance["modality"] != 1),
            history_noise=float(settings["history_noise"]),
        )

    def _context_latents(self, params, context, layout):
        """Clean latents of the context frames, {modality: [P or 1, ...]}; zeros in a modality without any."""
        clean = {m: np.zeros((1, *shape), np.float32) for m, shape in layout.latent_shapes.items()}
        if context.video is None and context.audio is None:
            return clean
        rows = max(len(x) for x in (context.video, context.audio) if x is not None)
        shapes = (layout.frames, *self.system.config.data.size, 3), (layout.samples,)
        video = np.zeros((rows, *shapes[0]), np.uint8) if context.video is None else context.video
        audio = np.zeros((rows, *shapes[1]), np.float32) if context.audio is None else context.audio
        if (video.shape[1:], audio.shape[1:]) != shapes:
            raise UserError(f"context of shapes {video.shape} and {audio.shape} does not fit {layout.frames} frames")
        z = jax.device_get(self._encode(params, video, audio))
        return {m: np.asarray(z[m]) if context.masks[m].any() else clean[m] for m in z}


def resolve(defaults, options):
    """config.sample with `options` in place of its values; None keeps the value. Raises UserError for a wrong option.

    A number as guidance sets only guidance.text, not text_continue or text_cross_modal.
    """
    for name in options:
        one_of("option", name, tuple(defaults))
    settings = {**defaults, **{name: value for name, value in options.items() if value is not None}}
    guidance = settings["guidance"]
    guidance = dict(guidance) if hasattr(guidance, "items") else {"text": guidance}
    for name in guidance:
        one_of("guidance", name, tuple(defaults.guidance))
    settings["guidance"] = {**defaults.guidance, **{name: w for name, w in guidance.items() if w is not None}}
    check({"sample": settings})
    return settings


def sample(
    system,
    params,
    key,
    numbers,
    tokens,
    clean,
    control,
    memory,
    masks,
    levels,
    weights,
    *,
    method,
    interval,
    guides,
    history_noise,
):
    """-> (video uint8 [B, F, H, W, 3], audio float32 [B, N], memory after these clips). Pure; to be jitted.

    numbers: int [B]; the noise of row i is drawn from (key, numbers[i]).
    clean: latents of the context frames, {modality: [B or 1, ...]}.
    control: {'control': [B or 1, T, A]}, the buttons held in each latent frame; {} for a denoiser without control.
    memory: of the scenes, see system/memory.py; {} where it is empty, or for a denoiser without memory.
    masks, levels: bool [T] and log_snr [S+1, T] per modality; see tasks.py.
    weights: of guidance, {'text', 'history', 'modality'}, and 'rescale'.
    guides: three bools: whether to use text, history and modality guidance.
    """
    noise_key, sampler_key = jax.random.split(key)
    settings = system.config.denoiser.diffusion
    shapes = {name: x.shape[1:] for name, x in clean.items()}

    # 1. What the sampler starts from: noise, and context frames, clean or lightly noised.
    clean = {name: jnp.broadcast_to(x, (len(numbers), *x.shape[1:])) for name, x in clean.items()}
    is_context = {name: broadcast_to_latent(masks[name][None], x) for name, x in clean.items()}
    noise, guidance_noise, context_noise = (draw_noise(noise_key, numbers, shapes, which) for which in range(3))
    first_levels = {name: jnp.broadcast_to(levels[name][:1], (len(numbers), levels[name].shape[1])) for name in shapes}
    is_clean = {name: broadcast_to_latent(first_levels[name] >= settings.log_snr_max, clean[name]) for name in shapes}
    where = functools.partial(jax.tree.map, jnp.where)
    noised = add_noise(clean, context_noise, first_levels)
    z = where(is_context, where(is_clean, clean, noised), noise)
    z = {modality: constrain(x) for modality, x in z.items()}

    # 2. The denoiser, guided.
    model = system.models["denoiser"]
    denoise_fn = functools.partial(model.apply, {"params": sharding.all_gather_params(params["denoiser"], model.dtype)})
    cond = system.encode_text(params, tokens)
    cond |= {name: jnp.broadcast_to(x, (len(numbers), *x.shape[1:])) for name, x in control.items()}
    if memory:
        cond |= {"memory": memory}
    if model.student:
        student_fn = denoise_fn

        def denoise_fn(z, log_snr, cond):
            return student_fn(z, log_snr, {**cond, "next_log_snr": distillation.next_levels(levels, log_snr)})

    terms = []
    if guides[0]:
        null = system.encode_null_text(params) | system.unknown_control(levels["video"].shape[1])
        terms += samplers.text_guidance(weights["text"], null)
    if guides[1]:
        terms += samplers.history_guidance(weights["history"], masks, guidance_noise, settings, history_noise)
    if guides[2]:
        terms += samplers.modality_guidance(weights["modality"], guidance_noise, settings)
    denoise_fn = samplers.guided(denoise_fn, terms, weights["rescale"], interval)

    # 3. The sampler. A clip must get the same noise of ddpm, however many clips there are. The noise depends on the key
    # and on the row of the clip in its batch. The key is made from the number of the first clip of the batch. Batches
    # begin at the clips 0, BATCH, 2 * BATCH, ..., so the batch of a given clip always begins with the same clip. (In
    # JAX a row of a random array does not depend on how many rows follow.)
    sampler_key = jax.random.fold_in(sampler_key, numbers[0])
    z = samplers.sample(denoise_fn, sampler_key, z, cond, levels, method, settings)
    z = where(is_context, clean, z)  # the context may be noised until here
    if model.memory:
        before = memory or scenes.empty(system.config.denoiser.model, system.layout, len(numbers))
        memory = scenes.write(system, params["denoiser"], before, z)
    return sharding.replicate((*system.decode(params, z), memory))


def draw_noise(key, numbers, shapes, which):
    """Standard normal noise {name: [B, *shapes[name]]} for clips `numbers` [B]; `which`: index of the draw, 0 to 2."""

    def draw(number, name):
        stream = 2 * which + sorted(shapes).index(name)
        clip_key = jax.random.fold_in(jax.random.fold_in(key, number), stream)
        # One axis, reshaped, gives the same numbers and compiles faster; see diffusion.noise_like.
        return jax.random.normal(clip_key, (math.prod(shapes[name]),)).reshape(shapes[name])

    return {name: jax.vmap(lambda number, name=name: draw(number, name))(numbers) for name in shapes}
