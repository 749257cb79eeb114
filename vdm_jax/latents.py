"""What the denoiser needs of the earlier stages: their frozen weights, latent statistics, and clips encoded once."""

import hashlib
import json
import logging

import jax
import numpy as np
from tqdm import tqdm

from vdm_jax import checkpoint, hosts, sharding, stages
from vdm_jax.data import pipeline

logger = logging.getLogger("vdm_jax")

ENCODE_BATCH = 32  # clips


def prepare(config, workdir, source, mesh):
    """-> (frozen, items) for training the denoiser.

    frozen: {stage: EMA params of the three earlier stages, 'statistics': ...}, on the mesh. items: `source` itself, or
    with config.denoiser.cached_clips > 0 a source of that many encoded clips, kept in the run's folder.
    """
    expected = stages.abstract_params(config)
    directory = workdir / "denoiser"
    params = {name: checkpoint.load_params(workdir, name, expected[name]) for name in checkpoint.STAGES[:3]}

    path = directory / "statistics.json"
    if not hosts.agreed(path.exists()):
        statistics = measure(config, params, source)
        if hosts.lead():
            checkpoint.write_statistics(path, statistics)
    else:
        statistics = checkpoint.read_statistics(path)
    frozen = {**params, "statistics": statistics}

    items = source
    if config.denoiser.cached_clips:
        items = _cached(config, frozen, source, directory / "latents")
    return jax.device_put(frozen, sharding.state_shardings(frozen, mesh)), items


def measure(config, params, source):
    """Per-channel mean and standard deviation of the latents of config.denoiser.statistics_clips training clips."""
    count = config.denoiser.statistics_clips
    logger.info("measuring latent statistics on %d clips", count)
    sums = {}
    for batch in _encoded_batches(config, params, source, count):
        for name, x in batch["z"].items():
            x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
            n, total, squares = sums.get(name, (0, 0.0, 0.0))
            sums[name] = n + len(x), total + x.sum(0), squares + np.square(x).sum(0)
    out = {}
    for name, (n, total, squares) in sums.items():
        mean = total / n
        std = np.sqrt(np.maximum(squares / n - mean**2, 1e-8))
        out[name] = {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}
    return out


def _encoded_batches(config, frozen, source, count):
    """Yields the source's first `count` training examples, encoded, in whole batches: {'z', 'text'[, 'near_miss']}.

    Each process encodes its share of a batch; all get the whole of it.
    """
    kinds = config.denoiser.near_misses

    @jax.jit
    def encode(frozen, batch):
        z = stages.encode(config, frozen, batch["video"], batch["audio"])
        texts = {"text": batch["tokens"]} | ({"near_miss": batch["near_miss"]} if kinds else {})
        return {"z": z, **{name: stages.encode_text(config, frozen, tokens) for name, tokens in texts.items()}}

    def to_example(item):
        return pipeline.example(item, config.data.text_length, kinds)

    own = -(-ENCODE_BATCH // jax.process_count())
    first, rows = jax.process_index() * own, jax.process_count() * own
    batches = pipeline.batches(
        source,
        batch_size=rows,
        rows=range(first, first + own),
        seed=config.seed,
        start=0,
        data=config.data,
        to_example=to_example,
    )
    alone = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1), jax.local_devices()[:1])
    for _ in tqdm(range(-(-count // rows)), "encode", disable=None if hosts.lead() else True, unit="batch"):
        with jax.set_mesh(alone):
            encoded = encode(frozen, next(batches))
        yield hosts.together(encoded)


class Encoded:
    """Encoded clips in memory, as a data source: {'z': latents, 'text': condition[, 'near_miss': condition]}."""

    def __init__(self, arrays):
        self.arrays = arrays

    def __len__(self):
        return len(self.arrays["text"]["pooled"])

    def take(self, numbers):
        """The items of these numbers as one: a leading axis more."""
        return jax.tree.map(lambda x: x[numbers], self.arrays)


def _cached(config, frozen, source, folder):
    """The cache in `folder` if it was made by these weights and this data, else made now. Half precision."""
    mark = _fingerprint(config, frozen)
    wanted = stages.abstract_batch(config, "denoiser")
    paths = jax.tree_util.tree_map_with_path(
        lambda path, _: folder / f"{sharding.path_name(path).replace('/', '_')}.npy", wanted
    )
    if hosts.agreed((folder / "fingerprint").exists() and (folder / "fingerprint").read_text() == mark):
        return Encoded(jax.tree.map(lambda path: np.load(path, allow_pickle=False), paths))
    count = config.denoiser.cached_clips
    logger.info("encoding %d clips once", count)
    parts = []
    for batch in _encoded_batches(config, frozen, source, count):
        parts.append(jax.tree.map(lambda want, x: np.asarray(x, want.dtype), wanted, batch))
    arrays = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:count], *parts)
    if hosts.lead():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "fingerprint").unlink(missing_ok=True)  # written last: it vouches for the files
        jax.tree.map(np.save, paths, arrays)
        (folder / "fingerprint").write_text(mark)
    return Encoded(arrays)


def _fingerprint(config, frozen):
    digest = hashlib.sha256()
    c = config.denoiser
    digest.update(json.dumps([config.seed, c.cached_clips, c.near_misses, config.data.to_json()]).encode())
    for leaf in jax.tree.leaves(frozen):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()
