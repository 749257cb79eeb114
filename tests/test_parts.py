"""A denoiser trained on codecs and a text encoder that come from folders.

One test runs this file in a process with 8 virtual devices: python tests/test_parts.py FOLDERS
"""

import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the process with 8 devices

import jax
import numpy as np
import pytest
from etils import epath

import vdm_jax
from tests import tiny
from tests.conftest import write_run
from tests.helpers import digest, final_state, finish, start
from vdm_jax import bench, sample, sharding, train, train_state, weights
from vdm_jax.data import batches
from vdm_jax.errors import UserError
from vdm_jax.models.published import naming
from vdm_jax.models.published.autoencoder_kl_wan import AutoencoderKLWan
from vdm_jax.models.published.autoencoder_oobleck import AutoencoderOobleck
from vdm_jax.models.published.bert_model import BertModel
from vdm_jax.run import folder, huggingface
from vdm_jax.system import build, latents
from vdm_jax.system.layout import layout
from vdm_jax.system.losses import encode_batch
from vdm_jax.system.parts import open_parts, with_hashes

pytest.importorskip("tokenizers")

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a red green blue circle square triangle moving left right up down".split()
WAN = dict(base_dim=4, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True])
OOBLECK = dict(
    encoder_hidden_size=8, decoder_channels=4, decoder_input_channels=4, channel_multiples=[1, 2],
    downsampling_ratios=[4, 8], audio_channels=2,
)  # fmt: skip
BERT = dict(
    vocab_size=len(VOCABULARY), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=32,
)  # fmt: skip


def publish(path, module, settings, key, seed=0):
    """Writes a folder of a published model with random weights."""
    model = naming.from_config(module, settings)
    params = jax.jit(model.init)(jax.random.key(seed), *model.example())["params"]
    huggingface.write(
        path,
        {key: module.__name__ if key == "_class_name" else [module.__name__], **settings},
        naming.to_tensors(params),
    )
    return params


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    publish(root / "video", AutoencoderKLWan, WAN, "_class_name")
    publish(root / "audio", AutoencoderOobleck, OOBLECK, "_class_name")
    publish(root / "text", BertModel, BERT, "architectures")
    (root / "text" / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return root


@pytest.fixture
def config(folders):
    return config_of(folders)


def config_of(folders):
    config = tiny.get_config("small").unlock()
    config.data.update(sample_rate=2048, text_length=16)  # 512 samples a latent frame: 16 tokens
    config.video_codec.source = str(folders / "video")
    config.audio_codec.source = str(folders / "audio")
    config.text_encoder.source = str(folders / "text")
    return config.lock()


def losses(system, mesh, params, clips):
    """The losses of training steps of the denoiser on these batches, one after the other."""
    with jax.set_mesh(mesh):
        program = train_state.program(system.stages["denoiser"], system.config.denoiser, jax.random.key(0), mesh, 0.0)
        state, found = program.init(), []
        for batch in jax.device_put(clips, sharding.batch_sharding(mesh)):
            state, metrics = program.step(state, jax.random.key(1), batch, params)
            found.append(metrics["loss"].item())
    return found


def test_sizes_follow_from_the_parts(config):
    system = build(config)
    assert (system.layout.f_t, system.layout.video, system.layout.audio) == (2, (8, 12, 4), (16, 4))
    assert system.tokenize(["a red circle moving left"])[0, :8].tolist() == [2, 5, 6, 9, 12, 13, 3, 0]
    states = system.stages["denoiser"].encoder_shapes
    assert states["clip"] == system.parts["clip"].param_shapes()


def test_encoded_and_decoded_as_by_the_parts(config):
    """The system only converts: pixels to [-1, 1], a mono sound to two channels, with silence before frame 0."""
    system = build(config)
    params = {stage: part.read() for stage, part in system.parts.items()}
    clips = batches.Examples(batches.source(config), system.tokenize).take([0, 1])
    z = jax.jit(system.encode)(params, clips["video"], clips["audio"])
    video, audio = (system.parts[f"{name}_autoencoder"].module for name in ("video", "audio"))
    pixels = clips["video"].astype(np.float32) / 127.5 - 1
    encode = jax.jit(lambda p, x: video.apply({"params": p}, x, method="encode")[0])
    np.testing.assert_allclose(z["video"], encode(params["video_autoencoder"], pixels), atol=1e-5)
    sound = np.pad(clips["audio"], ((0, 0), (256, 0)))[..., None].repeat(2, -1)
    encode = jax.jit(lambda p, x: audio.apply({"params": p}, x, method="encode")[0])
    np.testing.assert_allclose(z["audio"], encode(params["audio_autoencoder"], sound), atol=1e-5)
    params["statistics"] = {m: {"mean": 0.0, "std": 1.0} for m in z}
    made, heard = jax.jit(system.decode)(params, z)
    assert made.shape == clips["video"].shape and heard.shape == clips["audio"].shape
    text = jax.jit(system.encode_text)(params, clips["tokens"])
    assert text["states"].shape == (2, 16, 8) and text["mask"].sum(1).max() <= 16


def test_trained_on_resumed_and_sampled(folders, tmp_path, command):
    """A run that goes on. A part that has changed is refused; one that has moved is not."""
    flags = [
        "--config=tests/tiny.py:small", "--config.data.sample_rate=2048", "--config.data.text_length=16",
        "--config.denoiser.cached_clips=0", "--config.validation.every=0",
        *(f"--config.{key}.source={folders / name}" for key, name in PARTS.items()),
    ]  # fmt: skip
    whole = tmp_path / "whole"
    told = command(train, *flags, f"--workdir={whole}")
    assert told.code == 0, told.err
    assert sorted(path.name for path in whole.iterdir() if path.is_dir()) == ["denoiser"]  # nothing is copied
    stored = folder.read_config(whole)
    assert len(stored.video_codec.hash) == 64 and stored.video_codec.hash != stored.audio_codec.hash

    assert command(train, *flags, f"--workdir={whole}", "--stage=clip").err[-1].startswith("error: --stage=clip is not")
    assert command(bench, *flags, "--stage=clip").err[-1].startswith("error: --stage=clip is not")

    ended = shutil.copytree(whole, tmp_path / "ended")  # as if it had ended after step 4
    shutil.rmtree(ended / "denoiser/checkpoints/8")
    assert command(train, *flags, f"--workdir={ended}").code == 0
    states = [final_state(run, "denoiser", stored) for run in (whole, ended)]
    assert states[0]["step"] == 8 and digest(states[0]) == digest(states[1])

    exported, imported = tmp_path / "exported", tmp_path / "imported"
    assert command(weights, "export", f"--workdir={whole}", f"--out={exported}").code == 0
    command(weights, "import", f"--weights={exported}", f"--workdir={imported}", *flags)
    assert command(train, *flags, f"--workdir={imported}").code == 0  # it has the same parts, and all steps are done

    moved = tmp_path / "moved"
    shutil.copytree(folders / "text", moved)
    assert command(train, *flags, f"--config.text_encoder.source={moved}", f"--workdir={whole}").code == 0
    clip = vdm_jax.load(whole)("a red circle moving left", steps=2)
    assert clip.video.shape == (5, 16, 24, 3) and np.isfinite(clip.audio).all()

    (moved / "vocab.txt").write_text(
        "\n".join([*VOCABULARY[:-2], *VOCABULARY[:-3:-1]]) + "\n"
    )  # two words change places
    with pytest.raises(UserError, match="text_encoder.source=.*moved has other weights"):
        folder.read_system(whole, build)
    shutil.copy(folders / "text" / "vocab.txt", moved)
    publish(moved, BertModel, BERT, "architectures", seed=1)
    with pytest.raises(UserError, match="text_encoder.source=.*moved has other weights"):
        vdm_jax.load(whole)
    told = command(train, *flags, f"--config.text_encoder.source={moved}", f"--workdir={whole}")
    assert told.code == 2 and "was started with text_encoder.hash=" in told.err[-1]


PARTS = {"video_codec": "video", "audio_codec": "audio", "text_encoder": "text"}


def test_cached_clips_are_those_encoded_in_the_batch(config, tmp_path):
    system = build(with_hashes(config))
    examples = batches.Examples(batches.source(config), system.tokenize)
    (tmp_path / "denoiser").mkdir()
    mesh = sharding.make_mesh(config.mesh)
    params, (cached,) = latents.prepare([system], epath.Path(tmp_path), [examples], mesh, 0)
    order = dict(batch_size=4, seed=config.seed, start=0, data=config.data)
    clips = next(batches.batches(examples, **order))
    encoded = cached.take([0, 1, 2, 3])
    fresh = jax.jit(lambda p, b: encode_batch(system, p, b))(params, clips)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)  # noqa: E731 half precision
    jax.tree.map(same, encoded, jax.device_get(fresh))
    on_clips, on_encoded = (losses(system, mesh, params, [batch] * 3) for batch in (clips, encoded))
    assert len(set(on_clips)) == 3
    np.testing.assert_allclose(on_encoded, on_clips, rtol=1e-3)


def test_eight_devices_train_on_parts_as_one_does(folders):
    code, out, err = finish(start(__file__, folders, JAX_NUM_CPU_DEVICES="8"))
    assert code == 0 and out.startswith("equal"), "\n".join(err[-20:])


def compare_devices(folders):
    """Training steps on one of 8 devices, and on all of them, with clips that are encoded in the step."""
    config = config_of(folders)
    system = build(config)
    clips = batches.Examples(batches.source(config), system.tokenize).take(range(8))
    channels = {"video": system.layout.video[-1], "audio": system.layout.audio[-1]}
    found = []
    for sizes, devices in ((dict(data=1, fsdp=1), jax.devices()[:1]), (dict(data=2, fsdp=4), None)):
        mesh = sharding.make_mesh(sizes | dict(sequence=1, tensor=1), devices)
        params = {stage: part.read(mesh) for stage, part in system.parts.items()}
        statistics = {m: {"mean": np.zeros(n, "f"), "std": np.ones(n, "f")} for m, n in channels.items()}
        found.append(losses(system, mesh, params | {"statistics": statistics}, [clips] * 3))
    split = [path for path, x in sharding.named_leaves(params).items() if not x.sharding.is_fully_replicated]
    assert {path.rpartition("/")[2] for path in split} == {"kernel", "weight_v", "embedding"}
    np.testing.assert_allclose(*found, rtol=1e-5)
    print(f"equal: {found[0]} and {found[1]}")


WRONG = {
    "another class": ({"video_codec.source": "text"}, "holds a BertModel: it must be one of AutoencoderKLWan"),
    "no folder": ({"audio_codec.source": "nowhere"}, "audio_codec.source=.*nowhere is no folder"),
    "rate": ({"data.sample_rate": 2000}, "set data.sample_rate to 1920 or 2048 Hz$"),
    "size": ({"data.size": (15, 24)}, r"data.size=\(15, 24\) is not a multiple of 2: use \(14, 24\)"),
    "length": ({"data.frames": 6}, "use 5 or 7"),
    "texts": ({"data.text_length": 33}, "takes 32 tokens: set data.text_length=33 to that or less"),
    "other weights": ({"video_codec.hash": "0" * 64}, "video_codec.source=.* has other weights"),
}


@pytest.mark.parametrize("changes, words", WRONG.values(), ids=WRONG)
def test_parts_that_do_not_fit_are_one_line(config, folders, changes, words):
    changes = {key: str(folders / x) if key.endswith("source") else x for key, x in changes.items()}
    config.unlock().update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=words) as error:
        layout(config)
    assert "\n" not in str(error.value)


WRONG_FILES = {
    "no tokenizer": (lambda f: (f / "vocab.txt").unlink(), "has no tokenizer"),
    "large tokenizer": (
        lambda f: (f / "vocab.txt").open("a").write("more\n"),
        "tokenizer has 18 tokens, but .* only 17",
    ),
    "lost file": (lambda f: (f / WEIGHTS).rename(f / "away") and (f / WEIGHTS).symlink_to("/nowhere"), "is missing"),
    "no heads": (lambda f: settings(f, num_attention_heads=0), "BertModel cannot have these settings"),
    "layers": (lambda f: settings(f, num_hidden_layers=10**7), "has more layers in its config than in its"),
    "a run": (lambda f: (f / "denoiser").mkdir(), "has no clip: name the folder that it uses"),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def settings(path, **changes):
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))


@pytest.mark.parametrize("change, words", WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_files_are_one_line_before_anything_is_written(config, folders, tmp_path, change, words):
    copied = shutil.copytree(folders / "text", tmp_path / "text")
    change(copied)
    config.text_encoder.source = str(copied)
    with pytest.raises(UserError, match=words):
        with_hashes(config)


def test_parts_that_have_moved(folders, tiny_run, tmp_path, command, monkeypatch):
    """Exported weights of a run that had its parts by relative paths, used in another folder."""
    there, exported, imported = (tmp_path / name for name in ("there", "exported", "imported"))
    monkeypatch.chdir(shutil.copytree(folders, there))
    run = write_run(tmp_path / "run", with_hashes(config_of(Path())), ("denoiser",))
    assert command(weights, "export", f"--workdir={run}", f"--out={exported}").code == 0
    assert folder.read_config(exported).text_encoder.source == "text"
    monkeypatch.chdir(tmp_path)
    moved = {key: str(there / name) for key, name in PARTS.items()}
    flags = [f"--{key}.source={path}" for key, path in moved.items()]
    shown = sample, f"--weights={exported}", "--prompt=a red circle", f"--out={tmp_path / 'clip.mp4'}", "--steps=1"
    assert command(*shown, flags[0], flags[2]).err[-1] == (
        f"error: audio_codec.source=audio is no folder in {tmp_path}: give the part's folder of today, "
        "--audio_codec.source=FOLDER, or in Python parts={'audio_codec': FOLDER}"
    )
    assert command(*shown, *flags).code == 0
    for action in (("verify", exported), ("import", f"--weights={exported}", f"--workdir={imported}")):
        assert "is no folder" in command(weights, *action).err[-1]
        assert command(weights, *action, *flags).code == 0
    assert folder.read_config(imported).text_encoder.source == moved["text_encoder"]

    publish(there / "text", BertModel, BERT, "architectures", seed=1)
    for path, parts, words in (
        (exported, moved, "text_encoder.source=.*text has other weights"),
        (tiny_run, moved, "tiny has its own video_codec: leave out video_codec="),
        (exported, {"codec": "x"}, "no part 'codec': did you mean 'video_codec'"),
    ):
        with pytest.raises(UserError, match=words):
            vdm_jax.load(path, parts=parts)


def test_kernels_have_the_type_of_the_products(config):
    """In bfloat16 they take half the memory, and the codecs compute the same bits as with those in float32."""
    with config.unlocked():
        config.compute_dtype = "bfloat16"
    system = build(config)
    clips = batches.Examples(batches.source(config), system.tokenize).take([0, 1])
    half = {stage: part.read() for stage, part in system.parts.items()}
    full = {s: naming.to_params(huggingface.read_tensors(p.folder), p.module) for s, p in system.parts.items()}
    for path, x in sharding.named_leaves(half).items():
        assert x.dtype == ("bfloat16" if path.endswith(("/kernel", "/embedding")) else "float32"), path
    assert jax.eval_shape(lambda: half) == {stage: part.param_shapes() for stage, part in system.parts.items()}
    of_half, of_full = (jax.jit(lambda p, b: encode_batch(system, p, b))(params, clips) for params in (half, full))
    jax.tree.map(np.testing.assert_array_equal, of_half["z"], of_full["z"])
    np.testing.assert_allclose(of_half["text"]["states"], of_full["text"]["states"], atol=0.05)


def test_a_part_of_a_run_with_a_number(tmp_path):
    config = tiny.get_config()
    write_run(tmp_path / "run", config, ("audio_autoencoder",), run=7)
    config.audio_codec.source = str(tmp_path / "run")
    assert jax.tree.leaves(open_parts(config)["audio_autoencoder"].read())[0].any()


def test_a_part_of_another_run(tiny_run):
    config = tiny.get_config().unlock()
    for key in PARTS:
        config[key].source = str(tiny_run)
    system = build(config.lock())
    assert set(system.parts) == {"video_autoencoder", "audio_autoencoder", "clip"}
    assert system.layout == build(tiny.get_config()).layout
    for stage, part in system.parts.items():
        ema, _ = folder.read_params(tiny_run, stage, system.param_shapes[stage], 0)
        jax.tree.map(np.testing.assert_array_equal, part.read(), folder.as_exported(ema))


if __name__ == "__main__":
    assert jax.device_count() == 8
    compare_devices(Path(sys.argv[1]))
