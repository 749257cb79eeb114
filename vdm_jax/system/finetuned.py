"""A run that trains the denoiser of a published pipeline further: read to sample, and exported in its own layout."""

import hashlib

import jax
import numpy as np

from vdm_jax import lora, sharding
from vdm_jax.errors import UserError
from vdm_jax.models.published import naming
from vdm_jax.run import card, checksums, folder, huggingface, record, storage
from vdm_jax.system import adapters, build
from vdm_jax.system.parts import is_finetuned
from vdm_jax.system.published import TextToVideo

COPIED = ("vae", "text_encoder", "tokenizer", "scheduler")  # folders of the pipeline, which training does not change
SUFFIXES = (".json", ".txt", ".model", ".safetensors")  # of their files; pickles stay behind


def is_run(workdir):
    """Returns whether a folder is such a run. Raises UserError for a damaged config.json."""
    path = folder.given(workdir)
    return (path / "config.json").exists() and not folder.is_exported(path) and folder.read_system(path, is_finetuned)


def read(workdir, parts=None):
    """Returns (System, parameters of the denoiser, their step): the EMA, with adapters merged in. Raises UserError.

    parts: see folder.read_system, here and below
    """
    workdir = storage.given(workdir)
    system = folder.read_system(workdir, build, parts)
    shapes = system.stages["denoiser"].param_shapes
    params, step = folder.read_params(workdir, "denoiser", shapes, folder.run_number(workdir))
    if lora.active(system.config.denoiser):
        params = system.denoiser_params(params, {"base": system.read_published()})
    return system, params, step


def load(workdir, lora=(), parts=None):
    """Returns the published.TextToVideo of a run. Its clips have the size and length of training. Raises UserError.

    lora: adapters that are merged in, texts as in adapters.merge_files
    """
    system, unet, _ = read(workdir, parts)
    vae, text_encoder = system.parts["video_autoencoder"], system.parts["clip"]
    mesh = sharding.make_mesh(dict(data=1, fsdp=-1, sequence=1, tensor=1))
    unet = adapters.merge_files(jax.device_put(unet, sharding.state_shardings(unet, mesh)), lora)
    return sampler(system, {"unet": unet, "vae": vae.read(mesh), "text_encoder": text_encoder.read(mesh)}, mesh)


def sampler(system, params, mesh):
    """Returns the published.TextToVideo of a System. Its clips have the size and length of training.

    params: {"unet", "vae" and "text_encoder": parameters}
    """
    text_encoder, data = system.parts["clip"], system.config.data
    return TextToVideo(
        system.models["denoiser"],
        system.parts["video_autoencoder"].module,
        text_encoder.module,
        text_encoder.tokenizer,
        params,
        mesh,
        fps=data.fps,
        seconds=data.frames / data.fps,
        size=tuple(data.size),
    )


def export(workdir, out, license="", parts=None):
    """Writes a run as the folder of a pipeline, which diffusers and `published.load` read. Returns its size in bytes.

    The unet has half precision. The other parts are copied, without their pickled files.

    license: see card.check_license; "" if it is not stated
    Raises UserError, and writes nothing, where the folder `out` has files already.
    """
    system, params, step = read(workdir, parts)
    out = storage.make_folder(out)
    if any(out.iterdir()):
        raise UserError(f"{out} has files already: give a new --out")
    config, vae = system.config, system.parts["video_autoencoder"].module
    source = storage.given(config.denoiser.source)
    _, settings = huggingface.read_config(source / "unet")
    settings.pop("_name_or_path", None)
    height, width = (side // vae.f_s for side in config.data.size)
    if height == width:  # diffusers reads one number: the default size of a clip
        settings["sample_size"] = height
    tensors = naming.to_tensors(jax.tree.map(lambda x: np.asarray(x, np.float16), params))
    huggingface.write(out / "unet", settings, tensors)
    files = [source / huggingface.PIPELINE]
    files += [path for name in COPIED if (source / name).is_dir() for path in (source / name).iterdir()]
    for path in files:
        if path.suffix in SUFFIXES and storage.is_file(path):
            (target := out / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            path.copy(target)
    with (out / "unet" / huggingface.WHOLE[1]).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    changes = record.write_changes(storage.given(workdir), out)
    storage.replace(out / card.NAME, card.finetuned(config, step, sha256, changes, license))
    checksums.write(out)
    return sum((out / name).stat().length for name in checksums.files(out))
