"""The dry run: programs of the tiny recipe, compiled for a small TPU slice.

Each compilation has a process of its own, because a process can load libtpu only once.
"""

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
from vdm_jax.system import build

KEYS = {
    "topology", "chips", "params", "fits", "hbm_bytes_per_chip", "hbm_capacity_bytes", "model_flops_per_chip",
    "executed_flops_per_chip", "collective_bytes_per_chip", "roofline_seconds", "bound_by", "compile_seconds",
}  # fmt: skip
CONFIG, FSDP = "--config=tests/tiny.py", ("--config.mesh.data=1", "--config.mesh.fsdp=-1")

compiler = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64" and importlib.util.find_spec("libtpu")),
    reason="libtpu, which contains the TPU compiler, is for Linux on x86-64",
)


def plan(tmp_path, *options, config=CONFIG):
    """Runs dry_run with these options. Returns (exit code, printed text, the JSON from --out)."""
    out = tmp_path / "made" / "plan.json"
    process = start("-m", "vdm_jax.dry_run", config, f"--out={out}", *options, XLA_FLAGS="")
    code, printed, err = finish(process)
    assert code in (0, 3), "\n".join(err[-20:])
    return code, printed, json.loads(out.read_text())


@compiler
@pytest.mark.skipif(
    jax.__version_info__ < (0, 8),
    reason="jaxlib 0.7 needs more than 20 GB of memory to read how the arguments of this program are split",
)
def test_the_train_step_asks_for_no_permutes(tmp_path):
    # The frames are 96 pixels wide. Model FLOPs count the windows of a convolution over padding, and no chip executes
    # them; with smaller frames they are a large share.
    options = ("--topology=v5e:2x2", *FSDP, "--config.compute_dtype=bfloat16", "--config.data.size=96,96")
    code, printed, made = plan(tmp_path, *options, config=f"{CONFIG}:hard_negatives")
    assert code == 0 and made["fits"] and made["chips"] == 4
    assert set(made) >= KEYS and all(key in printed for key in KEYS - {"topology"})
    # Chips gather weights, scatter gradients and add up sums. They exchange nothing else.
    assert made["collectives"]["all-gather"] > 10
    assert made["unasked_collectives"] == 0 and set(made["collectives"]) <= {
        "all-gather", "all-reduce", "reduce-scatter"
    }  # fmt: skip
    # A chip gathers the parameters a few times, in bfloat16: 2 bytes for each parameter.
    assert made["collective_bytes_per_chip"]["all-gather"] < 4 * 2 * made["params"]
    assert 0 < made["argument_bytes"] < made["hbm_bytes_per_chip"] < made["hbm_capacity_bytes"]
    assert 0.9 < made["model_share"] < 1.1
    assert made["roofline_seconds"] > 0 and made["bound_by"] in ("compute", "memory", "network")


@compiler
def test_a_program_that_does_not_fit_gets_suggestions_that_fit(tmp_path):
    # No small slice has the memory for the activations of 2**20 clips at once.
    options = ["--stage=video_autoencoder", "--config.video_autoencoder.batch_size=1048576", "--try"]
    code, printed, made = plan(tmp_path, "--topology=v5e:2x2", *FSDP, *options)
    assert code == 3 and not made["fits"]
    assert made["too_much_bytes"] == made["hbm_bytes_per_chip"] - made["hbm_capacity_bytes"] > 0
    fitting = [suggestion for suggestion in made["suggestions"] if suggestion.get("fits")]
    assert fitting and fitting[0]["change"] + " (fits)" in printed
    assert fitting[0]["hbm_bytes_per_chip"] < made["hbm_capacity_bytes"]


@compiler
def test_a_slice_may_be_smaller_than_a_host_and_an_axis_smaller_than_a_side():
    script = """
from vdm_jax import dry_run, sharding
print([len(dry_run.slice_devices(name)) for name in ("v5e:1x1", "v5e:2x1", "v5e:2x4", "v4:2x2x1")])
sharding.make_mesh(dict(data=-1, fsdp=1, sequence=1, tensor=1), dry_run.slice_devices("v4:2x2x1"))
mesh = sharding.make_mesh(dict(data=-1, fsdp=16, sequence=1, tensor=1), dry_run.slice_devices("v6e:8x8"))
print(mesh.shape["data"], mesh.shape["fsdp"])
"""
    code, out, _ = finish(start("-c", script))
    assert code == 0 and out.splitlines() == ["[1, 2, 8, 4]", "4 16"]


def test_suggestions_keep_to_the_mesh():
    config = tiny.get_config()
    config.clip.batch_size = 64
    system = build(config)
    result = dict(chips=8, mesh={"data": 4, "fsdp": 2}, params=10**9, argument_bytes=2e9, hbm_capacity_bytes=16e9)
    suggestions = dry_run.suggestions(system, "clip", {**result, "hbm_bytes_per_chip": 40e9})
    changes = {key: value for suggestion in suggestions for key, value in suggestion["keys"].items()}
    # GB: arguments, gradients and temporaries are 2 + 2 + 38 / 4 < 0.9 * 16, and 2 + 2 + 38 / 2 is more.
    assert changes["clip.accumulate"] == 4
    assert changes["clip.batch_size"] == 8 * 2
    assert changes["clip.remat"] == "blocks"
    for suggestion in suggestions:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(suggestion["keys"])
        assert suggestion["change"].startswith("--config.")
        mesh = ml_collections.ConfigDict({"shape": {"data": 4, "fsdp": 2}})
        sharding.check_batch(changed.clip.batch_size, mesh, changed.clip.accumulate)
    large_state = {**result, "argument_bytes": 20e9, "hbm_bytes_per_chip": 40e9}
    suggestions = dry_run.suggestions(system, "clip", large_state)
    assert {"mesh.data": 2, "mesh.fsdp": 4} in [suggestion["keys"] for suggestion in suggestions]


def test_suggestions_keep_groups_of_clips_together():
    config = tiny.get_config("hard_negatives")
    config.denoiser.batch_size = 64
    config.denoiser.hard_negatives.every = 4
    result = dict(chips=8, mesh={"data": 4, "fsdp": 2}, params=10**9, argument_bytes=2e9, hbm_capacity_bytes=16e9)
    suggestions = dry_run.suggestions(build(config), "denoiser", {**result, "hbm_bytes_per_chip": 20e9})
    changes = {key: value for suggestion in suggestions for key, value in suggestion["keys"].items()}
    assert changes["denoiser.accumulate"] == 2  # of 8 clips on a chip, 4 are a group
    assert changes["denoiser.batch_size"] == 8 * 4  # room for 5 clips on a chip


@pytest.mark.parametrize("error, used, capacity", [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded", 16.5, 15.75),
    ("RESOURCE_EXHAUSTED: memory required for HLO temporaries (20.5G) exceeds available HBM (15.75G)", 21.5, 15.75),
])  # fmt: skip
def test_refusals_are_read(error, used, capacity):
    result = dry_run.read_refusal(error, argument_bytes=2**30)
    assert result["hbm_bytes_per_chip"] == used * 2**30 and result["hbm_capacity_bytes"] == capacity * 2**30
    with pytest.raises(RuntimeError, match="INTERNAL"):
        dry_run.read_refusal("INTERNAL: a bug", argument_bytes=0)


@pytest.mark.parametrize("options, message", [
    ([], "--config=FILE and --topology=NAME"),
    ([CONFIG], "--topology"),
    ([CONFIG, "--topology=v5e:2x2", "--part=all"], "--part"),
    ([CONFIG, "--topology=v5e:2x2", "--mfu=0"], "--mfu=0"),
    ([CONFIG, "--topology=v5e:2x2", "more"], "unexpected argument 'more'"),
])  # fmt: skip
def test_wrong_input_is_one_clear_line(command, options, message):
    done = command(dry_run, *options)
    assert done.code == 2 and len(done.err) == 1
    assert done.err[0].startswith("error: ") and message in done.err[0]


@compiler
def test_a_slice_that_does_not_suit_the_recipe_is_one_clear_line():
    told = {
        ("--topology=v5e:banana",): "--topology=v5e:banana",
        ("--topology=v5e:2x2", "--config.mesh.fsdp=3"): "does not fill 4 device(s)",
        ("--topology=v5e:2x2", "--config.denoiser.batch_size=6"): "use 4 or 8",
        ("--topology=v5e:2x2", "--config.mesh.tensor=4"): "mesh.tensor=4",
    }
    script = f"""
from vdm_jax import dry_run
from vdm_jax.errors import UserError
from vdm_jax.run import cli
for options in {list(told)}:
    try:
        cli.call(dry_run, "{CONFIG}", *options)
    except UserError as error:
        print(error)
"""
    code, out, err = finish(start("-c", script))
    assert code == 0 and len(out.splitlines()) == len(told), err
    assert all(words in line for words, line in zip(told.values(), out.splitlines())), out
