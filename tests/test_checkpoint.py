"""Train states come back as they were, and damaged checkpoints are found."""

import json
import re
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests import tiny
from tests.helpers import finish, start
from vdm_jax import weights
from vdm_jax.errors import UserError
from vdm_jax.run import checkpoint, checksums
from vdm_jax.run import folder as run_folder

PARAMS = {
    "stem": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4) / 7, "bias": np.ones(4, np.float32)},
    "scale": np.float32(0.25),
}
EXPECTED = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)


def state(step, factor=1.0):
    params = jax.tree.map(lambda x: jnp.asarray(factor * x), PARAMS)
    return {"step": jnp.asarray(step), "params": params, "ema": jax.tree.map(lambda x: 2 * x, params)}


ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))


def save(directory, *states, losses=None, **keep):
    with checkpoint.manager(directory, **keep) as checkpoints:
        for i, one in enumerate(states):
            checkpoint.save(checkpoints, one, losses[i] if losses else 1.0)
        checkpoint.finish(checkpoints)


def restore(directory, abstract=None):
    with checkpoint.manager(directory) as checkpoints:
        return checkpoint.restore(checkpoints, abstract or ABSTRACT)


def steps(directory):
    return sorted(int(p.name) for p in directory.iterdir())


def flip(path, place=None, bit=0):
    """Changes one bit of a file, by default in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1 << bit
    path.write_bytes(content)


def arrays(folder):
    """Returns the largest file of a checkpoint, which holds its arrays."""
    return max((p for p in (folder / "default").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --------------------------------------------------------------------------------------------------- checkpoints


def test_the_newest_state_comes_back(tmp_path):
    save(tmp_path, state(1), state(2, 5.0), state(3, 7.0))
    with checkpoint.manager(tmp_path) as checkpoints:
        restored = checkpoint.restore(checkpoints, ABSTRACT)
        assert checkpoints.all_steps() == [2, 3]
    equal(restored, state(3, 7.0))
    assert restore(tmp_path / "none") is None


def test_weights_are_the_average_of_the_newest_state(tmp_path):
    save(tmp_path / "clip" / "checkpoints", state(1), state(2, 5.0))
    equal(run_folder.read_params(tmp_path, "clip", EXPECTED, 0)[0], jax.tree.map(lambda x: 10 * x, PARAMS))
    other = {**EXPECTED, "scale": jax.ShapeDtypeStruct((2,), np.float32)}
    with pytest.raises(UserError, match=r"scale is float32 \(\), the config asks for float32 \(2,\)"):
        run_folder.read_params(tmp_path, "clip", other, 0)


def test_a_save_that_was_cut_off_does_not_count(tmp_path):
    folder = tmp_path / "clip" / "checkpoints"
    save(folder, state(1))
    rest = folder / "2.orbax-checkpoint-tmp"
    rest.mkdir()
    (rest / "half").write_text("half")
    equal(run_folder.read_params(tmp_path, "clip", EXPECTED, 0)[0], jax.tree.map(lambda x: 2 * x, PARAMS))
    assert rest.exists()  # it may be the current save of a training run, so a reader does not delete it
    with checkpoint.manager(folder) as checkpoints:
        assert checkpoints.latest_step() == 1
        for _ in range(300):  # the run itself deletes it, in the background
            if not rest.exists():
                break
            time.sleep(0.1)
    assert not rest.exists()


def test_the_newest_and_the_best_are_never_deleted(tmp_path):
    losses = [3.0, 1.0, 2.0, np.nan, 4.0, np.inf]
    save(tmp_path, *map(state, range(1, 7)), losses=losses)
    assert steps(tmp_path) == [2, 5, 6]  # a loss of nan is never the best
    save(tmp_path, state(7), losses=[0.5])  # in a later process, too
    assert steps(tmp_path) == [6, 7]
    save(tmp_path, state(8), state(9), newest=1, best=0)
    assert steps(tmp_path) == [9]


def test_a_deletion_that_was_cut_off_leaves_no_damaged_checkpoint(tmp_path, caplog, command):
    with checkpoint.manager(tmp_path / "run", newest=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoint.save(checkpoints, state(step), loss=step)  # 3 supersedes 2, which is neither newest nor best
    rest = tmp_path / "run" / checkpoint.SUPERSEDED / "2"
    checksums.check(rest)  # it is moved as a whole before a file of it is deleted
    shutil.rmtree(rest / "metrics")
    assert command(weights, "verify", tmp_path / "run").code == 0
    checkpoint.quarantine_damaged(tmp_path / "run")
    assert not caplog.messages and not (tmp_path / "damaged").exists()
    assert restore(tmp_path / "run")["step"] == 3 and steps(tmp_path / "run") == [1, 3]


def test_a_step_is_not_saved_twice(tmp_path):
    with checkpoint.manager(tmp_path) as checkpoints:
        checkpoint.save(checkpoints, state(4))
        for again in (4, 3):
            with pytest.raises(UserError, match=f"step {again} is not saved: .* holds step 4"):
                checkpoint.save(checkpoints, state(again, 9.0))
    equal(restore(tmp_path), state(4))


def test_another_dtype_shape_or_name_is_refused(tmp_path):
    save(tmp_path / "clip" / "checkpoints", state(1))
    folder = tmp_path / "clip" / "checkpoints"

    def other(**changes):
        return {**ABSTRACT, "params": {**ABSTRACT["params"], **changes}}

    half, long = jax.ShapeDtypeStruct((), jnp.bfloat16), jax.ShapeDtypeStruct((3,), jnp.float32)
    for abstract, words in (
        (other(scale=half), r"params/scale is float32 \(\), the config asks for bfloat16 \(\)"),
        (other(scale=long), r"params/scale is float32 \(\), the config asks for float32 \(3,\)"),
        (other(more=long), "has no params/more"),
        ({k: v for k, v in ABSTRACT.items() if k != "ema"}, "has ema/scale, which the config does not"),
    ):
        with pytest.raises(UserError, match=words):
            restore(folder, abstract)
    with pytest.raises(UserError, match="scale is float32 .*, the config asks for bfloat16"):
        run_folder.read_params(tmp_path, "clip", {**EXPECTED, "scale": half}, 0)


MESHES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from vdm_jax.run import checkpoint
from vdm_jax import sharding

tree = {"params": {"kernel": np.arange(64.0, dtype="f").reshape(8, 8), "bias": np.ones(8, "f")}, "step": np.int32(3)}
ways = dict(one=dict(data=2, fsdp=2), two=dict(data=1, fsdp=4), three=dict(data=2, tensor=2), four=dict(data=4))
meshes = {k: sharding.make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, **way}) for k, way in ways.items()}
with checkpoint.manager(sys.argv[1]) as checkpoints:
    checkpoint.save(checkpoints, jax.device_put(tree, sharding.state_shardings(tree, meshes["one"])))
for mesh in meshes.values():
    shardings = sharding.state_shardings(tree, mesh)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
    with checkpoint.manager(sys.argv[1]) as checkpoints:
        back = checkpoint.restore(checkpoints, abstract)
    jax.tree.map(np.testing.assert_array_equal, back, tree)
    assert jax.tree.map(lambda x: x.sharding, back) == shardings
print("restored on", len(meshes))
"""


def test_a_state_is_restored_on_another_mesh(tmp_path):
    code, out, err = finish(start("-c", MESHES, tmp_path / "run", JAX_NUM_CPU_DEVICES="4"))
    assert code == 0 and out == "restored on 4\n", err


# -------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_checkpoint_is_named_and_set_aside(tmp_path, caplog):
    folder = tmp_path / "clip" / "checkpoints"
    save(folder, state(1), state(2, 5.0), state(3, 7.0), newest=3)
    checkpoint.quarantine_damaged(folder)
    assert steps(folder) == [1, 2, 3] and not caplog.text
    content = files(folder / "3")
    flip(arrays(folder / "3"))
    with pytest.raises(UserError, match=f"{arrays(folder / '3')} is damaged"):  # a reader does not move it
        run_folder.read_params(tmp_path, "clip", EXPECTED, 0)
    checkpoint.quarantine_damaged(folder)
    (record,) = caplog.records
    (aside,) = (tmp_path / "clip" / "damaged").iterdir()
    assert record.levelname == "ERROR" and f"3/{arrays(aside).relative_to(aside)} is damaged" in record.message
    assert set(files(aside)) == set(content) and files(aside) != content
    equal(restore(folder), state(2, 5.0))
    save(folder, state(3, 7.0))  # the run reaches step 3 again
    equal(run_folder.read_params(tmp_path, "clip", EXPECTED, 0)[0], jax.tree.map(lambda x: 14 * x, PARAMS))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_where_all_are_damaged_none_is_moved(tmp_path, command):
    folder = tmp_path / "clip" / "checkpoints"
    save(folder, state(1), state(2))
    shutil.rmtree(folder / "1" / "default")
    flip(folder / "2" / checksums.NAME)
    before = files(tmp_path)
    with pytest.raises(UserError, match=f"no checkpoint in {folder} is whole .*2/checksums.txt is damaged.*restore a"):
        checkpoint.quarantine_damaged(folder)
    assert files(tmp_path) == before
    done = command(weights, "verify", tmp_path)
    assert done.code == 2 and done.out.count("DAMAGED") == 3  # with the config.json, which is missing
    assert len(done.err) == 1 and "is missing, and 2 more are damaged" in done.err[0]


def test_any_flipped_bit_is_found(tmp_path):
    """The short form of `python -m tests.soak flips`."""
    folder, rng = tmp_path / "clip" / "checkpoints", np.random.default_rng(0)
    save(folder, state(1), state(2, 5.0))
    whole = files(folder / "2")
    found = 0
    for _ in range(40):
        name = rng.choice(sorted(map(str, whole)))
        place = rng.integers(len(whole[epath.Path(name)]) or 1)
        if not whole[epath.Path(name)]:
            continue
        flip(folder / "2" / name, place, rng.integers(8))
        checkpoint.quarantine_damaged(folder)
        assert steps(folder) == [1], name
        found += 1
        shutil.rmtree(tmp_path / "clip" / "damaged")
        for path, content in whole.items():
            (folder / "2" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "2" / path).write_bytes(content)
    assert found > 35


def test_a_checkpoint_without_checksums_counts_as_damaged(tmp_path, caplog):
    folder = tmp_path / "clip" / "checkpoints"
    save(folder, state(1), state(2, 5.0))
    (folder / "2" / checksums.NAME).unlink()
    with pytest.raises(UserError, match="2 has no checksums.txt, so damage would not be noticed: restore this file"):
        run_folder.read_params(tmp_path, "clip", EXPECTED, 0)
    assert steps(folder) == [1, 2]  # a reader does not move it
    checkpoint.quarantine_damaged(folder)
    assert steps(folder) == [1] and "2 has no checksums.txt" in caplog.text
    (folder / "1" / checksums.NAME).unlink()
    with pytest.raises(UserError, match="no checkpoint in .* is whole .*1 has no checksums.txt.*restore a copy"):
        checkpoint.quarantine_damaged(folder)
    assert steps(folder) == [1]


def test_what_is_no_whole_checkpoint_of_its_number_is_set_aside(tmp_path, caplog):
    folder = tmp_path / "clip" / "checkpoints"
    save(folder, state(20), state(24, 5.0))
    shutil.copytree(folder / "20", folder / "28")  # a copy under another number
    (folder / "30").mkdir()
    shutil.copytree(folder / "24", folder / "32")  # a copy that was cut off
    for path in sorted((folder / "32").rglob("*"))[::2]:
        path.unlink() if path.is_file() else None
    others = ("031", "step_40", "-5", "24.bak", " 24", "+24", "２４")  # no names of a step
    for other in others:
        (folder / other).mkdir()
    (folder / "36").write_text("no folder")
    (folder / "38").symlink_to("nowhere")
    with pytest.raises(checksums.Damaged, match="28 is step 20 of run 0, where step 28 of run 0 belongs"):
        checkpoint.check(folder / "28")
    assert checkpoint.steps(folder) == [20, 24, 28, 30, 32]
    checkpoint.quarantine_damaged(folder)
    assert {path.name for path in folder.iterdir()} == {"20", "24", *others} and len(caplog.messages) == 5
    moved = f"it is moved to {tmp_path / 'clip' / 'damaged'}/{{}}-.*, and the stage goes on from step 24"
    for name, fault in (
        ("28", "is step 20 of run 0, where step 28 of run 0 belongs"),
        ("30", "holds no arrays, so it is no checkpoint: restore it, or move it away"),
        ("36", "is no folder, so it is no checkpoint"),
        ("38", "is no folder, so it is no checkpoint"),
    ):
        assert re.search(f"{folder / name} {fault}; {moved.format(name)}", caplog.text), name
    equal(restore(folder), state(24, 5.0))
    (folder / "24").rename(folder / "23")
    checkpoint.quarantine_damaged(folder)
    assert checkpoint.steps(folder) == [20] and "23 is step 24 of run 0, where step 23" in caplog.text
    equal(restore(folder), state(20))


@pytest.mark.parametrize("unverified", [False, True])
def test_a_stray_folder_is_no_step_that_is_done(tmp_path, unverified, caplog, command):
    """An empty folder and copies with the numbers of later steps than the stage has, beside its last step."""
    run, config = epath.Path(tmp_path / "run"), tiny.get_config()
    run.mkdir()
    number = run_folder.write_config(run, config, ("clip",))
    checkpoints = run / "clip" / "checkpoints"
    with checkpoint.manager(checkpoints, number) as manager:
        checkpoint.save(manager, state(config.clip.steps))
    shutil.copytree(checkpoints / "8", checkpoints / "8.bak")
    for stray in ("9", "99999999999999999999"):
        (checkpoints / stray).mkdir()
    shutil.copytree(checkpoints / "8", checkpoints / "12")
    with pytest.raises(UserError, match="99999999999999999999 holds no arrays, .* or continue training"):
        run_folder.read_params(run, "clip", EXPECTED, number)
    verified = command(weights, "verify", run)
    assert verified.code == 2 and "8.bak: no name of a step, not checked" in verified.out
    run_folder.write_config(run, config, ("clip",), unverified=unverified)
    assert json.loads((run / "starts.jsonl").read_text())["steps"]["clip"] == 8
    checkpoint.quarantine_damaged(checkpoints, number)
    assert checkpoint.steps(checkpoints) == [8] and caplog.text.count("goes on from step 8") == 3


@pytest.mark.parametrize("link", ["clip", "clip/checkpoints"])
def test_a_disk_that_is_not_mounted_does_not_begin_the_stage_anew(tmp_path, link):
    run = epath.Path(tmp_path / "run")
    (run / link).parent.mkdir(parents=True)
    run_folder.write_config(run, tiny.get_config(), ("clip",))
    (tmp_path / "run" / link).symlink_to(tmp_path / "not mounted")
    before = files(tmp_path)
    for call in (
        lambda: run_folder.write_config(run, tiny.get_config(), ("clip",)),
        lambda: run_folder.read_params(run, "clip", EXPECTED, 0),
    ):
        with pytest.raises(UserError, match=f"{link} is a link to a folder that is missing: mount its disk"):
            call()
    assert files(tmp_path) == before


SAVES = """
import resource, signal, sys
import jax.numpy as jnp
from vdm_jax.run import checkpoint, cli

def main(argv):
    folder, limit = sys.argv[1], int(sys.argv[2])
    with checkpoint.manager(folder) as checkpoints:
        checkpoint.save(checkpoints, {"step": jnp.asarray(1), "x": jnp.ones(1000)})
        checkpoint.finish(checkpoints)
    checkpoints = checkpoint.manager(folder)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # a write past it fails, as on a full disk
    checkpoint.save(checkpoints, {"step": jnp.asarray(2), "x": jnp.arange(1e6) ** 0.5})
    checkpoint.finish(checkpoints)

sys.argv[0] = "saves"
from absl import flags
cli.run(lambda argv: main(argv))
"""


def test_a_disk_that_is_full_ends_the_run_with_the_last_checkpoint_whole(tmp_path):
    folder = tmp_path / "clip" / "checkpoints"
    code, out, err = finish(start("-c", SAVES, folder, 1_000_000))
    errors = [line for line in err if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and errors[0] == err[-1], "\n".join(err)
    assert not any("Traceback" in line for line in err)
    assert f"cannot save step 2 in {folder}" in errors[0] and "step 1 is the newest checkpoint" in errors[0]
    checkpoint.quarantine_damaged(folder)
    abstract = {"step": jax.ShapeDtypeStruct((), jnp.int32), "x": jax.ShapeDtypeStruct((1000,), jnp.float32)}
    equal(restore(folder, abstract), {"step": 1, "x": np.ones(1000)})
