"""A published denoiser that is trained further: its loss against diffusers, its run, its exports, wrong settings."""

import json
import re
import shutil

import jax
import numpy as np
import pytest

from configs import t2v_modelscope
from tests.helpers import digest, final_state
from tests.test_published_pipeline import PROMPT, change_json, pipeline_of
from vdm_jax import diffusion, evaluate, lora, sample, train, weights
from vdm_jax.data import media
from vdm_jax.errors import UserError
from vdm_jax.sharding import named_leaves
from vdm_jax.system import adapters, build, finetuned, published
from vdm_jax.system import parts as system_parts

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

FRAMES = 3
SETTINGS = {
    "compute_dtype": "float32", "checkpoint_every": 1, "log_every": 1,
    "data.source": "world", "data.frames": FRAMES, "data.size": (16, 16), "data.text_length": 16,
    "denoiser.steps": 2, "denoiser.batch_size": 2, "denoiser.warmup_steps": 0, "denoiser.remat": "none",
}  # fmt: skip
CLIP = dict(fps=8, size=(16, 16), sample_rate=8000)
FLAGS = [f"--config.{key}={value}" for key, value in SETTINGS.items()]
ADAPTERS = ["--config=configs/t2v_modelscope.py:lora", *FLAGS, "--config.denoiser.learning_rate=0.01"]
ADAPTERS += ["--config.denoiser.cached_clips=4", "--config.validation.every=0"]
SHOW = [f'--config.validation.prompts=("{PROMPT}",)', "--config.validation.clips=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    pipeline_of(root / "tokenizer").save_pretrained(root / "model")
    return root / "model"


def recipe(folder, choice="all", **settings):
    config = t2v_modelscope.get_config(choice)
    config.update_from_flattened_dict({**SETTINGS, "denoiser.source": str(folder), **settings})
    return config


def unet_of(folder):
    """The parameters of the unet in a folder."""
    return system_parts.open_pipeline(folder, np.float32)[0]["unet"].read()


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("prediction, dropout", [("epsilon", 0.0), ("epsilon", 1.0), ("v_prediction", 0.0)])
def test_loss_of_diffusers(folder, tmp_path, prediction, dropout):
    """The same clips, captions, noise and timesteps give the same loss. A loss of v counts as that of the noise."""
    folder = shutil.copytree(folder, tmp_path / "model")
    change_json("scheduler/scheduler_config.json", prediction_type=prediction)(folder)
    target = {"epsilon": "noise", "v_prediction": "v"}[prediction]
    settings = {"denoiser.text_dropout": dropout, "denoiser.diffusion.target": target}
    system = build(recipe(folder, **settings))
    rng, captions = np.random.default_rng(0), [PROMPT, "a blue square"]
    video = rng.integers(0, 256, (2, FRAMES, 16, 16, 3), np.uint8)
    params = {name: part.read() for name, part in system.parts.items()} | {"statistics": system.known_statistics}
    batch = {"video": video, "audio": np.zeros((2, 1), np.float32), "tokens": system.tokenize(captions)}
    key = jax.random.key(1)
    loss, metrics = jax.jit(system.stages["denoiser"].loss)(system.read_published(), key, batch, params)
    assert loss == metrics["loss_video"] and "loss_audio" not in metrics

    key = jax.random.split(key, 3)[1]  # the others are for dropping texts and for hard negatives
    z = {"video": np.zeros((2, FRAMES, *system.layout.video), np.float32)}
    noised = diffusion.corrupt(key, z, system.diffusion)
    timesteps = torch.tensor(np.floor(np.asarray(noised.t["video"][:, 0]) * 1000).astype(int))
    noise = torch.tensor(np.array(diffusion.noise_like(jax.random.split(key)[1], z)["video"])).permute(0, 4, 1, 2, 3)
    theirs = diffusers.TextToVideoSDPipeline.from_pretrained(folder)
    scheduler = diffusers.DDPMScheduler.from_config(theirs.scheduler.config)
    with torch.no_grad():
        pixels = torch.tensor(video).permute(0, 1, 4, 2, 3).flatten(0, 1) / 127.5 - 1
        latents = theirs.vae.encode(pixels).latent_dist.mean * theirs.vae.config.scaling_factor
        latents = latents.unflatten(0, (2, FRAMES)).transpose(1, 2)  # [B, C, T, h, w]
        ids = theirs.tokenizer(["" if dropout else text for text in captions], padding="max_length").input_ids
        states = theirs.text_encoder(torch.tensor(ids))[0]
        got = theirs.unet.eval()(scheduler.add_noise(latents, noise, timesteps), timesteps, states).sample
        want = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
        error = (got - want).square().flatten(1).mean(1)
        error *= 1 if prediction == "epsilon" else scheduler.alphas_cumprod[timesteps]
    assert error.min() > 0.01 and len(set(timesteps.tolist())) == 2
    np.testing.assert_allclose(loss, error.mean(), rtol=1e-5)


def test_levels_of_a_table():
    config = dict(schedule="published", table=np.array([3.0, 1.0, -2.0]), log_snr_min=-9, log_snr_max=9, shift=1.0)
    t = np.array([0, 0.33, 0.34, 0.66, 0.67, 1], np.float32)
    np.testing.assert_array_equal(diffusion.log_snr_at(t, config), [3, 3, 1, 1, -2, -2])


# ------------------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("finetuned")


@pytest.fixture
def run(command, folder, workdir):
    """A run that trains the whole denoiser."""
    if not (workdir / "all").exists():
        flags = ["--config=configs/t2v_modelscope.py", *FLAGS, f"--config.denoiser.source={folder}", *SHOW]
        done = command(train, *flags, f"--workdir={workdir}/all")
        assert done.code == 0, done.err
    return workdir / "all"


@pytest.fixture
def adapted(command, folder, workdir):
    """A run that trains adapters."""
    if not (workdir / "adapted").exists():
        done = command(train, *ADAPTERS, f"--workdir={workdir}/adapted", f"--config.denoiser.source={folder}")
        assert done.code == 0, done.err
    return workdir / "adapted"


def test_it_begins_with_the_weights_and_resumes_bit_for_bit(command, run, folder, tmp_path):
    config = recipe(folder)
    state = final_state(run, "denoiser", config)
    before = unet_of(folder)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), state["params"], before)
    assert all(0 < x < 1e-4 for x in jax.tree.leaves(moved))  # two steps of Adam at a learning rate of 1e-5

    # Its validation: the clip of step 0 is that of the published pipeline.
    told = [json.loads(line) for line in (run / "denoiser" / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [0, 2] and told[0]["video/mean"] != told[1]["video/mean"]
    shown = [media.read_video(run / "denoiser" / "previews" / step / "000.mp4", **CLIP)[0] for step in ("0", "2")]
    (theirs,) = published.load(folder).clips([PROMPT], seconds=FRAMES / 8, size=(16, 16))
    assert np.abs(shown[0].astype(int) - theirs).mean() < 3  # H.264

    copy, other = shutil.copytree(run, tmp_path / "run"), shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(copy / "denoiser" / "checkpoints" / "2")
    flags = ["--config=configs/t2v_modelscope.py", *FLAGS, f"--config.denoiser.source={other}", f"--workdir={copy}"]
    flags += ["--config.validation.every=0"]
    done = command(train, *flags)
    assert done.code == 0 and any("1 of 2 steps done" in line for line in done.err)
    assert digest(final_state(copy, "denoiser", config)) == digest(state)

    today = other.rename(tmp_path / "today")
    done = command(sample, f"--workdir={copy}", "--prompt=x", f"--out={tmp_path}/x.mp4")
    assert done.code == 2 and "is no folder: give its folder of today, --denoiser.source=FOLDER" in done.err[-1]
    assert finetuned.read(copy, {"denoiser": today})[2] == 2
    today.rename(other)

    change_json("scheduler/scheduler_config.json", beta_end=0.013)(other)
    done = command(train, *flags)
    assert done.code == 2 and "was started with denoiser.hash=" in done.err[-1]
    done = command(sample, f"--workdir={copy}", "--prompt=x", f"--out={tmp_path}/x.mp4")
    assert done.code == 2 and "unet has other weights than those that the denoiser was trained with" in done.err[-1]


def test_a_run_is_sampled_and_exported_for_diffusers(command, run, folder, tmp_path):
    options = ["--steps=4", f"--prompt={PROMPT}"]
    assert command(sample, f"--workdir={run}", *options, f"--out={tmp_path}/run.mp4").code == 0
    assert media.probe(tmp_path / "run.mp4")["duration"] == FRAMES / 8
    (folder / "vae" / "pickled.bin").write_bytes(b"")
    done = command(weights, "export", f"--workdir={run}", f"--out={tmp_path}/out", "--license=cc-by-nc-4.0")
    (folder / "vae" / "pickled.bin").unlink()
    assert done.code == 0 and "in the layout of diffusers" in done.out, done.err
    assert not (tmp_path / "out" / "vae" / "pickled.bin").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "cc-by-nc-4.0"' in card and "| training steps | 2 of 2 |" in card and str(folder) not in card
    assert command(weights, "verify", f"{tmp_path}/out").code == 0

    noise = np.random.default_rng(0).normal(size=(1, FRAMES, 8, 8, 4)).astype(np.float32)
    pipes = {"run": finetuned.load(run), "out": published.load(tmp_path / "out")}
    settings = dict(steps=4, noise=noise, seconds=FRAMES / 8)
    made = {name: pipe.clips([PROMPT], **settings)[0] for name, pipe in pipes.items()}
    theirs = diffusers.TextToVideoSDPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    latents = torch.tensor(noise).permute(0, 4, 1, 2, 3)
    settings = dict(num_inference_steps=4, guidance_scale=9.0, num_frames=FRAMES, output_type="np")
    want = theirs(PROMPT, latents=latents, **settings)
    assert theirs.unet.config.sample_size == 8
    for name, video in made.items():
        assert np.abs(video / 255 - want.frames[0]).mean() <= 2 / 255, name

    for options, said in (
        ([f"--out={tmp_path}/out"], "has files already: give a new --out"),
        ([f"--out={tmp_path}/new", "--report=x.json"], "leave out --report"),
        ([f"--out={tmp_path}/new", "--adapters"], "has no adapters"),
    ):
        done = command(weights, "export", f"--workdir={run}", *options)
        assert done.code == 2 and said in done.err[-1]


def test_only_adapters_are_trained(command, adapted, folder, tmp_path):
    config = recipe(folder, "lora")
    state, base = final_state(adapted, "denoiser", config), unet_of(folder)
    assert all(re.search(f"{t2v_modelscope.LAYERS[:-8]}/lora_[AB]/kernel$", x) for x in named_leaves(state["params"]))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(state["params"]))

    options = ["export", f"--workdir={adapted}"]
    assert command(weights, *options, f"--out={tmp_path}/merged").code == 0
    assert command(weights, *options, f"--out={tmp_path}/alone", "--adapters").code == 0
    want = lora.merge(jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), base), state["ema"], 16.0)
    merged = unet_of(tmp_path / "merged")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-3), merged, want)
    for name, x in named_leaves(merged).items():  # the others are as in the folder, in half precision
        is_same = np.array_equal(x, named_leaves(base)[name].astype(np.float16))
        assert is_same != bool(re.search(t2v_modelscope.LAYERS, name)), name
    read, alpha = adapters.read(tmp_path / "alone" / adapters.FILE, base)
    assert alpha == 16.0
    jax.tree.map(np.testing.assert_array_equal, read, state["ema"])


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(
    "settings, said",
    [
        (
            {"denoiser.diffusion.schedule": "cosine"},
            "schedule='cosine': the denoiser of denoiser.source needs 'published'",
        ),
        ({"denoiser.diffusion.target": "v"}, "target='v': the denoiser of denoiser.source needs 'noise'"),
        ({"denoiser.diffusion.shift": 0.5}, "shift=0.5: the denoiser"),
        ({"denoiser.diffusion.patterns": dict(text=0.5, image=0.5)}, r"patterns=\['image', 'text'\]: the denoiser"),
        ({"denoiser.diffusion.weighting": "sigmoid"}, "weighting='sigmoid' needs a schedule with a slope"),
        ({"denoiser.hard_negatives.words": (("red", "blue"),)}, "words=.* needs"),
        ({"denoiser.distillation.teacher": "reference"}, "teacher='reference': the denoiser"),
        ({"denoiser.lora.base": "reference"}, "base='reference': the denoiser"),
        ({"audio_codec.source": "x"}, "source='x': the denoiser|source=x is no folder"),
        ({"denoiser.remat": "blocks,none"}, "has 2 values: it takes one value"),
        ({"data.text_length": 12}, "data.text_length=12: the texts of denoiser.source=.* have 16 tokens"),
        ({"data.size": (16, 15)}, r"data.size=\(16, 15\) is not a multiple of 2: use \(16, 14\)"),
        ({"denoiser.source": "none"}, "denoiser.source=none is no folder: give its folder of today"),
        (
            {"denoiser.source": "", "data.frames": 5},
            "schedule='published' is that of denoiser.source: name a folder there",
        ),
    ],
)
def test_wrong_settings_are_one_line(folder, settings, said):
    config = recipe(folder)
    config.unlock().update_from_flattened_dict({key: x for key, x in settings.items() if not isinstance(x, dict)})
    if "denoiser.diffusion.patterns" in settings:
        config.denoiser.diffusion.patterns = settings["denoiser.diffusion.patterns"]
    with pytest.raises(UserError, match=said) as error:
        build(system_parts.with_hashes(config))
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_has_sizes_alone(folder, tmp_path):
    """That is enough for dry_run, and not for training."""
    bare = shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors", "tokenizer"))
    config = recipe(bare)
    assert build(config).param_shapes == build(recipe(folder)).param_shapes
    with pytest.raises(UserError, match="unet has no safetensors file|vae has no safetensors file"):
        system_parts.with_hashes(config)


@pytest.mark.parametrize(
    "script, options, said",
    [
        (evaluate, ["--out=OUT"], "only python -m vdm_jax.sample"),
        (train, ["--config=configs/t2v_modelscope.py", *FLAGS, "--stage=audio_autoencoder"], "has no sound"),
        (train, ["--config=configs/t2v_modelscope.py", *FLAGS, "--stage=clip"], "text_encoder has it"),
        (sample, ["--prompt=x", "--out=OUT/x.mp4", "--image=x.png"], "--image is not for a published model"),
    ],
    ids=["evaluate", "sound", "text", "image"],
)
def test_commands_that_do_not_apply_are_one_line(command, run, folder, tmp_path, script, options, said):
    options = [option.replace("OUT", str(tmp_path)) for option in options]
    if script is train:
        options.append(f"--config.denoiser.source={folder}")
    done = command(script, f"--workdir={run}", *options)
    assert done.code == 2 and len(done.err) == 1 and said in done.err[0]
