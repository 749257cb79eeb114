"""Every setting: the values that it may have, and whether a run may go on with another value.

The table has one row for each key of configs/common.py, or for several keys. docs/configuration.md prints it.
"""

import fnmatch
import functools
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

from vdm_jax import diffusion, optim, samplers, tasks
from vdm_jax.errors import UserError

# In the order of training. The stage "clip" is the text encoder, trained with a video tower as in CLIP. Everywhere
# else in this code, a clip is a video with its sound.
STAGES = ("video_autoencoder", "audio_autoencoder", "clip", "denoiser")
PARTS = ("video_codec", "audio_codec", "text_encoder")  # each may take the place of a stage, see system/parts.py
SOURCES = (*PARTS, "denoiser")  # what may come from a folder

PROMPT_FILES = ("image", "video", "audio", "continue")  # what a prompt of validation may start from

# Rules for a run that goes on, as the documentation prints them.
FIXED = "fixed"  # once its stage has a checkpoint: the saved state has no meaning with another value
CHANGE = "`--change`"  # once its stage has taken a step: another value gives another training
GROWS = "may grow"  # a smaller value needs --change, and cannot be below the steps that are done
FREE = "free"  # it does not change what is trained


class Allowed(NamedTuple):
    """The values that a setting may have."""

    words: str  # "True or False", for the documentation and for the error
    fits: Callable  # fits(value) -> bool


class Setting(NamedTuple):
    keys: str  # patterns between spaces; * stands for any characters, and STAGE for any of the four stages
    allowed: Allowed
    rule: str  # FIXED, CHANGE, GROWS or FREE


def whole(low, high=math.inf, multiple=1):
    words = f"a whole number {_range(low, high)}" + (f", a multiple of {multiple}" if multiple > 1 else "")
    return Allowed(words, lambda x: _is(numbers.Integral, x) and low <= x <= high and x % multiple == 0)


def number(low=-math.inf, high=math.inf):
    words = f"a finite number {_range(low, high)}".rstrip()
    return Allowed(words, lambda x: _is(numbers.Real, x) and math.isfinite(x) and low <= x <= high)


def several(each, least=1, most=math.inf):
    count = f"{least} or more" if most == math.inf else f"{least} to {most}" if least < most else f"{least}"
    fits = lambda x: _is_list(x) and least <= len(x) <= most and all(map(each.fits, x))  # noqa: E731
    return Allowed(f"{count} values, each {each.words}", fits)


def choice(*names):
    return Allowed(f"{', '.join(names[:-1])} or {names[-1]}", lambda x: isinstance(x, str) and x in names)


def _range(low, high):
    if high < math.inf:
        return f"from {low} to {high}"
    return f"of at least {low}" if low > -math.inf else ""


def _is(kind, x):
    return isinstance(x, kind) and not isinstance(x, bool)


def _is_list(x):
    return isinstance(x, tuple | list)


def _is_rising(x):
    return _is_list(x) and len(x) == 2 and all(map(number().fits, x)) and x[0] < x[1]


def _are_shares(x):
    shares = list(x.values()) if isinstance(x, dict) else []
    return set(x) <= set(diffusion.PATTERNS) and all(map(number(0).fits, shares)) and any(shares) if shares else False


def _are_prompts(x):
    return _is_list(x) and all(isinstance(each, str) or _is_prompt(each) for each in x)


def _is_prompt(x):
    if not hasattr(x, "items"):
        return False
    values = dict(x)
    seed, text = values.pop("seed", 0), values.pop("text", None)
    files = set(values) <= set(PROMPT_FILES) and all(isinstance(path, str) for path in values.values())
    return isinstance(text, str) and whole(0, 2**31 - 1).fits(seed) and files and len(values) <= 1


ABOVE_0 = Allowed("a finite number above 0", lambda x: number(0).fits(x) and x > 0)
BELOW_1 = Allowed("a number of at least 0 and below 1", lambda x: number(0, 1).fits(x) and x < 1)
RISING = Allowed("two finite numbers, the first below the second", _is_rising)
SIZE = whole(1, 1_000_000)  # of a part of a model
SHARES = Allowed(f"shares of at least 0, one of them above 0, for some of {', '.join(diffusion.PATTERNS)}", _are_shares)
SWITCH = Allowed("True or False", lambda x: x in (True, False))
TEXT = Allowed("a text", lambda x: isinstance(x, str))
MESH = Allowed("-1 or a whole number of at least 1", lambda x: whole(-1).fits(x) and x != 0)
GROUPS = Allowed("groups of words", _is_list)  # see hard_negatives.check_groups
PHASES = Allowed("phases, see system/phases.py", _is_list)
PROMPTS = Allowed('texts, or {"text", "seed"} with at most one of image, video, audio and continue', _are_prompts)
REMAT = Allowed("none, pointwise or blocks, or one of them for each resolution", TEXT.fits)  # see networks.remat_modes

# The first row with a pattern that matches a key counts.
TABLE = (
    Setting("seed", whole(0, 2**31 - 1), CHANGE),
    Setting("checkpoint_every log_every keep.newest skip.stop_after", whole(1), FREE),
    Setting("keep.best validation.every", whole(0), FREE),
    Setting("validation.clips validation.noise_levels", whole(1), FREE),
    Setting("validation.prompts", PROMPTS, FREE),
    Setting("validation.raw", SWITCH, FREE),
    Setting("wandb.project", TEXT, FREE),
    Setting("wandb.mode", choice("offline", "online"), FREE),
    Setting("heartbeat_every watchdog_seconds", number(0), FREE),
    Setting("skip.loss_over_mean", number(0), CHANGE),
    Setting("compute_dtype", choice("float32", "bfloat16"), CHANGE),
    Setting("compilation_cache", TEXT, FREE),
    Setting("mesh.*", MESH, FREE),
    # ------------------------------------------------------------------------------------------------------- data
    Setting("data.source", choice("world", "files", "tfds", "doom"), CHANGE),
    Setting("data.fps", number(0.1, 1000), FIXED),
    Setting("data.frames data.sample_rate", whole(1), FIXED),
    Setting("data.size", several(whole(1), 2, 2), FIXED),
    Setting("data.buckets", several(TEXT, least=0), CHANGE),  # see buckets.parse
    Setting("data.text_length", whole(2), FIXED),
    Setting("data.control", several(TEXT, least=0), FIXED),
    Setting("data.threads data.prefetch", whole(0), FREE),
    Setting("data.world.objects", several(number(0, 1), most=3), CHANGE),
    Setting("data.world.gravity data.world.occluder data.world.leave data.world.pan", number(0, 1), CHANGE),
    Setting("data.world.light data.world.undirected data.world.wordings", number(0, 1), CHANGE),
    Setting("data.files.held_out", BELOW_1, CHANGE),
    Setting("data.files.flip", SWITCH, CHANGE),
    Setting("data.doom.held_out", several(TEXT), CHANGE),
    Setting("data.doom.episodes", whole(0), CHANGE),
    Setting("data.tfds.source_fps", number(0), CHANGE),
    Setting("data.tfds.source_sample_rate", whole(0), CHANGE),
    Setting("data.path data.hash data.tfds.*", TEXT, CHANGE),
    # ------------------------------------------------------------------------------------------------------ parts
    Setting("video_codec.source audio_codec.source text_encoder.source denoiser.source", TEXT, FREE),  # it may move
    Setting("video_codec.hash audio_codec.hash text_encoder.hash denoiser.hash", TEXT, FIXED),
    # ----------------------------------------------------------------------------------------------------- stages
    Setting("STAGE.steps", whole(1, 2**31 - 1), GROWS),
    Setting("STAGE.phases", PHASES, CHANGE),
    Setting("STAGE.batch_size STAGE.accumulate", whole(1), CHANGE),
    Setting("STAGE.remat", REMAT, FREE),
    Setting("STAGE.optimizer", choice(*optim.METHODS), FIXED),
    Setting("STAGE.learning_rate STAGE.clip_norm", ABOVE_0, CHANGE),
    Setting("STAGE.warmup_steps", whole(0), CHANGE),
    Setting("STAGE.weight_decay STAGE.*_weight", number(0), CHANGE),
    Setting("STAGE.beta2", BELOW_1, CHANGE),
    Setting("STAGE.ema", number(0, 1), CHANGE),
    Setting("audio_autoencoder.stft_windows", several(whole(4, multiple=4)), CHANGE),
    Setting("audio_autoencoder.mel_windows", several(whole(1, 1000)), CHANGE),
    Setting("audio_autoencoder.model.groups", whole(0, 1_000_000), FIXED),
    Setting("audio_autoencoder.model.overlap", SWITCH, FIXED),
    Setting("STAGE.model.attention STAGE.model.cross_modal", several(SWITCH), FIXED),
    Setting("STAGE.model.factorized STAGE.model.use_bias STAGE.model.student", SWITCH, FIXED),
    Setting("STAGE.model.blocks", several(whole(0, 1000)), FIXED),
    Setting("denoiser.model.memory denoiser.model.memory_past", whole(0, 1000), FIXED),
    Setting("denoiser.trained", TEXT, CHANGE),
    Setting("denoiser.latents", TEXT, FREE),  # latents.prepare compares its content
    Setting("denoiser.memory.windows", whole(1, 1000), CHANGE),
    Setting("denoiser.memory.cuts", number(0, 1), CHANGE),
    Setting("STAGE.model.middle_blocks STAGE.model.*layers", whole(0, 1000), FIXED),
    Setting("STAGE.model.audio_channels STAGE.model.*strides", several(SIZE, least=0), FIXED),
    Setting("STAGE.model.channels STAGE.model.video.channels", several(SIZE), FIXED),
    Setting("STAGE.model.head_dim", whole(2, 1_000_000, multiple=2), FIXED),  # rotary embeddings turn pairs of channels
    Setting("STAGE.model.*", SIZE, FIXED),
    Setting("STAGE.hard_negatives.words", GROUPS, CHANGE),
    # --------------------------------------------------------------------------------------------------- denoiser
    Setting("denoiser.text_dropout denoiser.control_dropout denoiser.distillation.teacher_share", number(0, 1), CHANGE),
    Setting("denoiser.cached_clips", whole(0), CHANGE),
    Setting("denoiser.statistics_clips denoiser.hard_negatives.every", whole(1), CHANGE),
    Setting("denoiser.hard_negatives.log_snr", RISING, CHANGE),
    Setting("denoiser.hard_negatives.weight denoiser.hard_negatives.anchor", number(0), CHANGE),
    Setting("denoiser.distillation.teacher denoiser.distillation.hash", TEXT, CHANGE),
    Setting("denoiser.distillation.steps", several(whole(1), least=2), CHANGE),
    Setting("denoiser.distillation.guidance.*", number(), CHANGE),
    Setting("denoiser.lora.rank", whole(0, 1_000_000), FIXED),
    Setting("denoiser.lora.alpha", ABOVE_0, FIXED),
    Setting("denoiser.lora.layers", TEXT, FIXED),
    Setting("denoiser.lora.base", TEXT, FREE),  # folder.read_base compares its content
    Setting("denoiser.diffusion.schedule", choice(*diffusion.SCHEDULES, diffusion.PUBLISHED), FIXED),
    Setting("denoiser.diffusion.log_snr_*", number(-80, 80), FIXED),  # exp(log_snr) must be finite in float32
    Setting("denoiser.diffusion.shift", ABOVE_0, FIXED),
    Setting("denoiser.diffusion.target", choice(*diffusion.TARGETS), FIXED),
    Setting("denoiser.diffusion.weighting", choice(*diffusion.WEIGHTINGS), CHANGE),
    Setting("denoiser.diffusion.min_snr_gamma", ABOVE_0, CHANGE),
    Setting("denoiser.diffusion.sigmoid_bias", number(), CHANGE),
    Setting("denoiser.diffusion.loss_weights.*", number(0), CHANGE),
    Setting("denoiser.diffusion.patterns", SHARES, CHANGE),
    # ------------------------------------------------------------------------------------------- sample, evaluate
    Setting("sample.method", choice(*samplers.METHODS), FREE),
    Setting("sample.spacing", choice(*tasks.SPACINGS), FREE),
    Setting("sample.guidance.*", number(-100, 100), FREE),  # far beyond it a clip is noise or of one color
    Setting("sample.history_noise sample.context_noise sample.rescale", number(0, 1), FREE),
    Setting("sample.interval", RISING, FREE),
    Setting("sample.first_step_times", several(number(0, 1), least=0), FREE),
    Setting("sample.lag", whole(0, tasks.MAX_STEPS), FREE),
    Setting("sample.steps", whole(1, tasks.MAX_STEPS), FREE),
    Setting("sample.context_frames evaluate.*", whole(1), FREE),
)

# What a run reads from outside its folder, {its hash: what a changed hash means}.
INPUTS = {
    "data.hash": "the folder of data.path or data.tfds.name has other videos or captions",
    "denoiser.distillation.hash": "denoiser.distillation.teacher has other weights",
}


@functools.cache
def setting(key):
    """Returns the Setting of a dotted key; None for a key that configs/common.py does not have."""
    stage, _, rest = key.partition(".")
    names = (key, f"STAGE.{rest}") if stage in STAGES else (key,)
    matches = (row for row in TABLE for name in names for keys in row.keys.split() if fnmatch.fnmatchcase(name, keys))
    return next(matches, None)


def flat(tree, above=""):
    """Returns {dotted key: value} of nested dicts. The shares of all patterns are the value of one key."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value and key != "patterns":
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = value
    return found


def check(tree):
    """Raises UserError where a setting has a value that is not allowed. tree: a config, or a part, as nested dicts."""
    for key, value in flat(tree).items():
        row = setting(key)
        if row and not row.allowed.fits(value):
            raise UserError(f"{key}={value!r} must be {row.allowed.words}")


# ------------------------------------------------------------------------------------------------ a run that goes on


def differences(before, now):
    """Returns {key: [value before, value now]} of the settings {key: value} that differ; None is for a missing key."""
    keys = sorted({*before, *now})
    return {key: [before.get(key), now.get(key)] for key in keys if before.get(key) != now.get(key)}


def check_diffusion(before, now, fix):
    """Raises UserError where trained weights of a denoiser have no meaning with the settings of this start.

    before, now: the settings that they were trained with, and those of this start, {key: value}
    fix: what the user can do, as the end of the error message
    """
    for key, (old, new) in differences(before, now).items():
        if key.endswith(".hash") and key not in INPUTS and (old or "") != (new or ""):
            raise UserError(
                f"the weights were trained with another {key.removesuffix('.hash')}, and have no meaning with this "
                f"one: name that in {key.removesuffix('hash')}source"
            )
        if key.startswith("denoiser.diffusion.") and old is not None and setting(key).rule == FIXED:
            raise UserError(f"the weights were trained with {key}={old!r}, and have no meaning with {new!r}: {fix}")


def changes(workdir, before, now, done, stages, measured, allowed):
    """Returns the `differences` that a start makes in a run. Raises UserError for those that it must not make.

    before, now: the settings of the run and of this start, {key: value}, with values as JSON has them.
    done: {stage: the step of its newest checkpoint, or None}.
    stages: those that this start trains. In the other stages it changes nothing.
    measured: whether the statistics of the latents are measured.
    allowed: whether the user allows changes of the training.
    """
    check_steps({stage: done[stage] for stage in stages}, now, f"done in {workdir}", "another --workdir")
    made, to_allow = {}, []
    for key, (old, new) in differences(before, now).items():
        owner = key.partition(".")[0]
        owners = (owner,) if owner in STAGES else STAGES
        fixed = measured if key == "data.frames" else any(done[stage] is not None for stage in owners)
        # One version of this package has the key, and another has not: such a change is told, and never refused. Where
        # an input comes or goes, another key says so.
        missing = old is None or new is None or key in INPUTS and "" in (old, new)
        rule = FREE if missing else _rule(key, before, now, done)
        if rule == FIXED and fixed:
            raise UserError(
                f"{workdir} was started with {key}={old!r}, and what it has saved has no meaning with {new!r}: give "
                "the old value, or another --workdir"
            )
        if owner in STAGES and owner not in stages:
            continue
        made[key] = [old, new]
        if rule in (FIXED, CHANGE) and any(done[stage] for stage in owners):
            to_allow.append(INPUTS.get(key) or _told(key, old, new))
    if to_allow and not allowed:
        raise UserError(
            f"{workdir} was trained with other settings ({'; '.join(to_allow)}): give --change to go on with the new "
            "values, or give the old ones"
        )
    return made


def _told(key, old, new):
    """Returns a change as words. Of phases only what differs is told, because a phase has many settings."""
    if not key.endswith(".phases"):
        return f"{key}={old!r}, now {new!r}"
    told = [f"{key} has {len(old)}, now {len(new)}"] * (len(old) != len(new))
    for number, pair in enumerate(zip(old, new), 1):
        told += [f"phase {number} of {key}: {name}={a!r}, now {b!r}" for name, (a, b) in differences(*pair).items()]
    return ", ".join(told)


def check_steps(done, now, where, otherwise):
    """Raises UserError where the settings `now` give a stage fewer steps than are done: {stage: step or None}.

    where, otherwise: for the message; STAGE in `otherwise` stands for the stage.
    """
    for stage, step in done.items():
        if (step or 0) > now[f"{stage}.steps"]:
            raise UserError(
                f"{stage}.steps={now[f'{stage}.steps']}, but {step} steps are {where}: give at least {step}, or "
                f"{otherwise.replace('STAGE', stage)}"
            )


def _rule(key, before, now, done):
    """The rule of a key. Steps that shrink, or that move the end of a phase that is done, need --change."""
    row = setting(key)
    if row is None:
        return CHANGE
    if row.rule != GROWS:
        return row.rule
    stage = key.partition(".")[0]

    def finished_phases(settings):
        ends = phase_ends(settings[key], settings.get(f"{stage}.phases", ()))
        return [end for end in ends[:-1] if end <= (done[stage] or 0)]

    return FREE if now[key] > before[key] and finished_phases(before) == finished_phases(now) else CHANGE


def phase_ends(steps, parts):
    """Returns the last step of each phase of a stage. parts: <stage>.phases, [{'share': ..., ...}]."""
    shares = [part["share"] for part in parts]
    return [round(steps * sum(shares[: i + 1])) for i in range(len(shares))]
