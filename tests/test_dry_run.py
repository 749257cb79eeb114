"""Programs of a tiny recipe, compiled for a small TPU slice by libtpu in a process of its own: it loads once."""

import importlib.util
import json
import platform
import sys

import jax
import ml_collections
import pytest

from tests import tiny
from tests.helpers import finish, start
from vdm_jax import dry_run, sharding

KEYS = {
    "topology", "chips", "params", "fits", "hbm_bytes_per_chip", "hbm_capacity_bytes", "model_flops_per_chip",
    "executed_flops_per_chip", "collective_bytes_per_chip", "roofline_seconds", "bound_by", "compile_seconds",
}  # fmt: skip
CONFIG, FSDP = "--config=tests/tiny.py", ("--config.mesh.data=1", "--config.mesh.fsdp=-1")

compiler = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64" and importlib.util.find_spec("libtpu")),
    reason="libtpu, which has the TPU compiler, is for Linux on x86-64",
)


def plan(tmp_path, *options, config=CONFIG):
    """-> (exit code, what was printed, the JSON written) of dry_run with these options."""
    out = tmp_path / "made" / "plan.json"
    process = start("-m", "vdm_jax.dry_run", config, f"--out={out}", *options, XLA_FLAGS="")
    code, printed, err = finish(process)
    assert code in (0, 3), "\n".join(err[-20:])
    return code, printed, json.loads(out.read_text())


@compiler
@pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason="jaxlib 0.7 takes over 20 GB to read from this program how its arguments are split",
)
def test_the_train_step_asks_for_no_permutes(tmp_path):
    # Frames of 96: of smaller ones, much of what a model's FLOPs count is windows over padding, which no chip executes.
    options = ("--topology=v5e:2x2", *FSDP, "--config.compute_dtype=bfloat16", "--config.data.size=96")
    code, printed, made = plan(tmp_path, *options, config=f"{CONFIG}:hard_negatives")
    assert code == 0 and made["fits"] and made["chips"] == 4
    assert set(made) >= KEYS and all(key in printed for key in KEYS - {"topology"})
    # Weights are gathered and gradients scattered; nothing else moves but sums.
    assert made["collectives"]["all-gather"] > 10
    assert made["unasked_collectives"] == 0 and set(made["collectives"]) <= {
        "all-gather", "all-reduce", "reduce-scatter"
    }  # fmt: skip
    # In bfloat16, and a few times: whole parameters are 2 bytes each, of which a quarter is there already.
    assert made["collective_bytes_per_chip"]["all-gather"] < 4 * 2 * made["params"]
    assert 0 < made["argument_bytes"] < made["hbm_bytes_per_chip"] < made["hbm_capacity_bytes"]
    assert 0.9 < made["model_share"] < 1.1
    assert made["roofline_seconds"] > 0 and made["bound_by"] in ("compute", "memory", "network")


@compiler
def test_what_does_not_fit_is_told_with_what_would(tmp_path):
    # 2**20 clips: no small slice holds what an autoencoder remembers of them at once.
    options = ["--stage=video_autoencoder", "--config.video_autoencoder.batch_size=1048576", "--try"]
    code, printed, made = plan(tmp_path, "--topology=v5e:2x2", *FSDP, *options)
    assert code == 3 and not made["fits"]
    assert made["too_much_bytes"] == made["hbm_bytes_per_chip"] - made["hbm_capacity_bytes"] > 0
    fitting = [one for one in made["suggestions"] if one.get("fits")]
    assert fitting and fitting[0]["change"] + " (fits)" in printed
    assert fitting[0]["hbm_bytes_per_chip"] < made["hbm_capacity_bytes"]


@compiler
def test_slices_smaller_than_a_host_are_known_and_axes_that_take_part_of_a_side():
    script = """
from vdm_jax import dry_run, sharding
print([len(dry_run.devices(f"v5e:{n}")) for n in ("1x1", "2x1", "2x4")])
mesh = sharding.make_mesh(dict(data=-1, fsdp=16, sequence=1, tensor=1), dry_run.devices("v6e:8x8"))
print(mesh.shape["data"], mesh.shape["fsdp"])
"""
    code, out, _ = finish(start("-c", script))
    assert code == 0 and out.splitlines() == ["[1, 2, 8]", "4 16"]


def test_suggestions_keep_to_the_mesh():
    config = tiny.get_config()
    config.clip.batch_size = 64
    told = dict(chips=8, mesh={"data": 4, "fsdp": 2}, params=10**9, argument_bytes=2e9, hbm_capacity_bytes=16e9)
    found = dry_run.suggestions(config, "clip", {**told, "hbm_bytes_per_chip": 40e9})
    changes = {key: value for one in found for key, value in one["keys"].items()}
    assert changes["clip.accumulate"] == 4  # 2 + 2 + 38 / 4 fits in nine tenths of 16, 38 / 2 does not
    assert changes["clip.batch_size"] == 8 * 2
    assert changes["clip.remat"] == "blocks"
    for one in found:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(one["keys"])
        assert one["change"].startswith("--config.")
        mesh = ml_collections.ConfigDict({"shape": {"data": 4, "fsdp": 2}})
        sharding.check_batch(changed.clip.batch_size, mesh, changed.clip.accumulate)
    state = dry_run.suggestions(config, "clip", {**told, "argument_bytes": 20e9, "hbm_bytes_per_chip": 40e9})
    assert {"mesh.data": 2, "mesh.fsdp": 4} in [one["keys"] for one in state]


@pytest.mark.parametrize("error, used, capacity", [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded", 16.5, 15.75),
    ("RESOURCE_EXHAUSTED: memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G)", 21.5, 15.75),
])  # fmt: skip
def test_refusals_are_read(error, used, capacity):
    told = dry_run.refused(error, {"argument_bytes": 2**30})
    assert told["hbm_bytes_per_chip"] == used * 2**30 and told["hbm_capacity_bytes"] == capacity * 2**30
    with pytest.raises(RuntimeError, match="INTERNAL"):
        dry_run.refused("INTERNAL: a bug", {})


@pytest.mark.parametrize("options, told", [
    ([], "--config=FILE and --topology=NAME"),
    ([CONFIG], "--topology"),
    ([CONFIG, "--topology=v5e:2x2", "--part=all"], "--part"),
    ([CONFIG, "--topology=v5e:2x2", "--mfu=0"], "--mfu=0"),
    ([CONFIG, "--topology=v5e:2x2", "more"], "unexpected argument 'more'"),
])  # fmt: skip
def test_wrong_input_is_one_clear_line(command, options, told):
    done = command(dry_run, *options)
    assert done.code == 2 and len(done.err) == 1
    assert done.err[0].startswith("error: ") and told in done.err[0]


@compiler
@pytest.mark.parametrize("options, told", [
    (["--topology=v5e:banana"], "--topology=v5e:banana"),
    (["--topology=v5e:2x2", "--config.mesh.fsdp=3"], "does not fill 4 device(s)"),
    (["--topology=v5e:2x2", "--config.denoiser.batch_size=6"], "use 4 or 8"),
    (["--topology=v5e:2x2", "--config.mesh.tensor=4"], "mesh.tensor=4"),
])  # fmt: skip
def test_slices_that_do_not_fit_are_told(options, told):
    code, _, err = finish(start("-m", "vdm_jax.dry_run", CONFIG, *options))
    assert code == 2 and told in err[-1] and err[-1].startswith("error: "), err
