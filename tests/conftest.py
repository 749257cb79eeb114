"""A run of tests/tiny.py with random weights in its checkpoints, and a way to call a script as a user does."""

import sys
from types import SimpleNamespace

import jax
import pytest
from absl import flags

from tests import tiny
from vdm_jax import checkpoint, cli, stages, train_state


def write_run(workdir, config, names=checkpoint.STAGES):
    """A run folder of which the stages `names` have a checkpoint; no layer is zero, so that every input counts."""

    def shaken(key, params):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten([x + 0.05 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])

    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json_best_effort())
    size = stages.layout(config)
    for number, name in enumerate(names):
        key = jax.random.key(number)
        state = train_state.create(jax.jit(lambda k, n=name: shaken(k, stages.init_fns(config)[n](k)))(key), config[name])
        with checkpoint.manager(workdir / name / "checkpoints") as checkpoints:
            checkpoint.save(checkpoints, state | {"step": state["step"] + config[name].steps})
    if "denoiser" in names:
        channels = {"video": size.video[-1], "audio": size.audio[-1]}
        statistics = {m: {"mean": [0.1] * n, "std": [0.8] * n} for m, n in channels.items()}
        checkpoint.write_statistics(workdir / "denoiser" / "statistics.json", statistics)
    return workdir


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a tiny run with all four stages."""
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", tiny.get_config())


@pytest.fixture
def command(monkeypatch, capfd):
    """call(script, *options) -> (code, out, lines on stderr): what `python -m vdm_jax.<script> *options` does."""

    def call(script, *options):
        import logging

        known = set(flags.FLAGS)
        script.define_flags()
        logger = logging.getLogger("vdm_jax")
        before = list(logger.handlers)
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, options)])
        capfd.readouterr()
        try:
            with pytest.raises(SystemExit) as left:
                cli.run(script.main)
        finally:
            logger.handlers[:] = before
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        out, err = capfd.readouterr()
        return SimpleNamespace(code=left.value.code or 0, out=out, err=err.splitlines())

    return call
