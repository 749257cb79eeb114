"""Every key of configs/common.py: the values that it may have, and whether a run may go on with another value."""

import functools
import json
import math
import re

import pytest

from configs import common, world_words
from vdm_jax import settings
from vdm_jax.errors import UserError
from vdm_jax.run import record
from vdm_jax.settings import STAGES

DEFAULTS = settings.flat(common.get_config().to_dict())
# What a run that has begun may change freely, and never. A key is meant with all that begins with it. All other keys
# need --change.
FREE = (
    *"checkpoint_every log_every keep. validation. wandb. heartbeat_every skip.stop_after compilation_cache".split(),
    *"watchdog_seconds mesh. data.threads data.prefetch sample. evaluate.".split(),
    *(f"{stage}.{key}" for stage in STAGES for key in ("remat", "steps")),  # more steps
    *("denoiser.lora.base", "denoiser.latents"),
    *(f"{part}.source" for part in ("video_codec", "audio_codec", "text_encoder", "denoiser")),
)
FIXED = (
    *"data.frames data.size data.fps data.sample_rate data.text_length data.control".split(),
    *(f"denoiser.diffusion.{key}" for key in ("schedule", "log_snr_", "shift", "target")),
    *(f"denoiser.lora.{key}" for key in ("rank", "alpha", "layers")),
    *(f"{part}.hash" for part in ("video_codec", "audio_codec", "text_encoder", "denoiser")),
    *(f"{stage}.{key}" for stage in STAGES for key in ("model.", "optimizer")),
)
BEGUN = dict.fromkeys(STAGES, 10)
BEFORE = record.of(common.get_config())
GROUPS = {}
for key in DEFAULTS:
    GROUPS.setdefault(key.partition(".")[0], []).append(key)


def wrong_values(value):
    if isinstance(value, bool):
        return [2, "yes", math.nan]
    if isinstance(value, int):
        return [-5, 1.5, "1", True, None]
    if isinstance(value, float):
        return [math.nan, math.inf, "1.0", True, None, (1.0,)]
    if isinstance(value, str):
        return [3, None]
    if isinstance(value, dict):
        return [{"txt": 1.0}, {"text": -1.0}, {"text": math.nan}, {"text": 0.0}, {}, 1.0]
    return [5, None, *((*value[1:], wrong) for each in value[:1] for wrong in wrong_values(each))]


def check(key, value):
    settings.check(functools.reduce(lambda tree, part: {part: tree}, reversed(key.split(".")), value))


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_has_allowed_values(group):
    """The default is one of them. Another value is an error that names the key, the value and what is allowed."""
    for key in GROUPS[group]:
        row, default = settings.setting(key), DEFAULTS[key]
        check(key, default)
        for value in wrong_values(default):
            with pytest.raises(UserError) as error:
                check(key, value)
            assert str(error.value) == f"{key}={value!r} must be {row.allowed.words}"


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("clip.ema", math.nan, "a finite number from 0 to 1"),
        ("clip.ema", 1.5, "a finite number from 0 to 1"),
        ("clip.weight_decay", math.nan, "a finite number of at least 0"),
        ("clip.learning_rate", -1.0, "a finite number above 0"),
        ("denoiser.clip_norm", -1.0, "a finite number above 0"),
        ("denoiser.beta2", 2.0, "a number of at least 0 and below 1"),
        ("denoiser.beta2", 1.0, "a number of at least 0 and below 1"),
        ("denoiser.warmup_steps", -5, "a whole number of at least 0"),
        ("denoiser.cached_clips", -1, "a whole number of at least 0"),
        ("denoiser.accumulate", 0, "a whole number of at least 1"),
        ("denoiser.hard_negatives.every", 0, "a whole number of at least 1"),
        ("denoiser.hard_negatives.log_snr", (1.0, -1.0), "two finite numbers, the first below the second"),
        ("denoiser.model.head_dim", 27, "a whole number from 2 to 1000000, a multiple of 2"),
        ("denoiser.model.text_layers", 9999, "a whole number from 0 to 1000"),
        ("denoiser.diffusion.shift", 0.0, "a finite number above 0"),
        ("denoiser.diffusion.target", "eps", "noise, x0 or v"),
        ("clip.optimizer", "adam", "adamw or muon"),
        ("compute_dtype", "bf16", "float32 or bfloat16"),
        ("data.source", "wrld", "world, files, tfds or doom"),
        ("data.world.objects", (0.5, 0.2, 0.2, 0.1), "1 to 3 values, each a finite number from 0 to 1"),
        ("data.files.held_out", 1.0, "a number of at least 0 and below 1"),
        (
            "audio_autoencoder.stft_windows",
            (65,),
            "1 or more values, each a whole number of at least 4, a multiple of 4",
        ),
        ("mesh.data", 0, "-1 or a whole number of at least 1"),
        ("sample.steps", 0, "a whole number from 1 to 10000"),
        ("sample.method", "euler", "ddpm, ddim, dpmpp_2m or heun"),
        ("evaluate.clips", 0, "a whole number of at least 1"),
    ],
)
def test_a_value_out_of_range_is_told(key, value, words):
    with pytest.raises(UserError, match=re.escape(f"{key}={value!r} must be {words}") + "$"):
        check(key, value)


# ------------------------------------------------------------------------------------------------ a run that goes on


def start(before, now, done=BEGUN, stages=STAGES, measured=True, allowed=False):
    return settings.changes("DIR", before, now, done, stages, measured, allowed)


def other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, dict):
        return {"text": 1.0}
    return value + ["new"] if isinstance(value, list) else f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_has_a_rule_for_a_run_that_goes_on(group):
    for key in GROUPS[group]:
        now = BEFORE | {key: [{"share": 1.0}] if key.endswith(".phases") else other(BEFORE[key])}
        made = {key: [BEFORE[key], now[key]]}
        assert start(BEFORE, now, dict.fromkeys(STAGES), measured=False) == made  # nothing has begun
        if key.startswith(FIXED):
            for allowed in (False, True):
                with pytest.raises(
                    UserError, match="no meaning with .*: give the old value, or another --workdir"
                ) as error:
                    start(BEFORE, now, allowed=allowed)
                assert f"DIR was started with {key}={BEFORE[key]!r}, " in str(error.value)
        elif key.startswith(FREE) or key in settings.INPUTS:  # an input that comes is told by another key
            assert start(BEFORE, now) == made
        else:
            with pytest.raises(UserError, match="give --change to go on") as error:
                start(BEFORE, now)
            told = f"{key} has 0, now 1" if key.endswith(".phases") else f"{key}={BEFORE[key]!r}, now {now[key]!r}"
            assert told in str(error.value)
            assert start(BEFORE, now, allowed=True) == made


def test_a_rule_counts_from_the_first_step_of_the_stage():
    imported = BEGUN | {"denoiser": 0}  # weights without a step of training
    rate, model, target = (
        BEFORE | {f"denoiser.{key}": value}
        for key, value in (("learning_rate", 1.0), ("model.patch", 2), ("diffusion.target", "x0"))
    )
    for now in (rate, model, target):
        assert len(start(BEFORE, now, BEGUN | {"denoiser": None})) == 1
    assert "denoiser.learning_rate" in start(BEFORE, rate, imported)
    for now in (model, target):
        with pytest.raises(UserError, match="no meaning"):
            start(BEFORE, now, imported)
    with pytest.raises(UserError, match="--change"):  # data is shared by all stages
        start(BEFORE, BEFORE | {"data.world.pan": 1.0}, dict.fromkeys(STAGES) | {"clip": 1})
    frames = BEFORE | {"data.frames": 33}
    with pytest.raises(UserError, match="data.frames=17, now 33.*--change"):
        start(BEFORE, frames, measured=False)
    assert start(BEFORE, frames, measured=False, allowed=True) == {"data.frames": [17, 33]}


def test_a_start_of_one_stage_changes_no_other():
    now = BEFORE | {"clip.learning_rate": 1.0, "denoiser.steps": 5, "audio_autoencoder.ema": 0.5}
    assert start(BEFORE, now, stages=["clip"], allowed=True) == {"clip.learning_rate": [2e-3, 1.0]}
    with pytest.raises(UserError, match="denoiser.model.patch=1"):  # the wrong model would encode or sample
        start(BEFORE, BEFORE | {"denoiser.model.patch": 2}, stages=["clip"])


def test_steps_may_grow():
    assert start(BEFORE, BEFORE | {"clip.steps": 2001}) == {"clip.steps": [2000, 2001]}
    with pytest.raises(UserError, match="clip.steps=2000, now 1999.*--change"):
        start(BEFORE, BEFORE | {"clip.steps": 1999})
    assert start(BEFORE, BEFORE | {"clip.steps": 10}, allowed=True) == {"clip.steps": [2000, 10]}
    with pytest.raises(UserError, match="^clip.steps=9, but 10 steps are done in DIR: give at least 10"):
        start(BEFORE, BEFORE | {"clip.steps": 9}, allowed=True)


def test_settings_of_other_versions_of_the_package_are_told_and_not_refused():
    older = {key: value for key, value in BEFORE.items() if key not in ("clip.ema", "denoiser.model.groups")}
    expected = {"clip.ema": [None, 0.999], "denoiser.model.groups": [None, 8]}
    assert start(older, BEFORE) == expected
    assert start(BEFORE, older) == {key: value[::-1] for key, value in expected.items()}
    with pytest.raises(UserError, match="data.world.colors=.'red'., now .'blue'..*--change"):  # a key of a recipe
        start(BEFORE | {"data.world.colors": ["red"]}, BEFORE | {"data.world.colors": ["blue"]})


@pytest.mark.parametrize("key, words", settings.INPUTS.items())
def test_a_changed_input_is_told_in_words(key, words):
    before, now = (BEFORE | {key: value} for value in ("1a", "2b"))
    with pytest.raises(UserError, match=f"^DIR was trained with other settings .{words}.: give --change to go on"):
        start(before, now)
    assert start(before, now, allowed=True) == {key: ["1a", "2b"]}
    assert start(before, BEFORE) == {key: ["1a", ""]}
    settings.check_diffusion(before, now, "weights may go on with it")


def test_the_end_of_a_finished_phase_may_not_move():
    before = record.of(world_words.get_config())
    first, *others, last = before["denoiser.phases"]
    steps = before["denoiser.steps"]
    ends = settings.phase_ends(steps, before["denoiser.phases"])
    assert ends[0] == 2500 and ends[-1] == steps

    def at(step, now, **options):
        return start(before, before | now, BEGUN | {"denoiser": step}, **options)

    longer = {"denoiser.steps": 2 * steps}  # every phase becomes twice as long
    assert at(2400, longer) == {"denoiser.steps": [steps, 2 * steps]}
    with pytest.raises(UserError, match=f"denoiser.steps={steps}, now {2 * steps}.*--change"):
        at(2500, longer)
    moved = last | {"share": last["share"] - 0.2 + first["share"]}
    shares = {"denoiser.phases": [first | {"share": 0.2}, *others, moved]}
    with pytest.raises(UserError, match="phase 1 of denoiser.phases: share=0.1.*, now 0.2, phase 5.*--change") as told:
        at(2500, shares)
    assert "data.frames" not in str(told.value)  # what is equal
    with pytest.raises(UserError, match="denoiser.phases has 5, now 4"):
        at(2500, {"denoiser.phases": [first, *others]})
    assert list(at(2500, shares, allowed=True)) == ["denoiser.phases"]
    assert list(at(None, shares)) == ["denoiser.phases"]


def test_the_settings_of_a_config_are_those_of_its_json():
    config = world_words.get_config()
    flat = record.of(config)
    assert flat["denoiser.diffusion.patterns"]["text"] == 0.64 and flat["denoiser.model.channels"] == [48, 112]
    assert json.loads(json.dumps(flat)) == flat and not settings.differences(flat, record.of(config))
