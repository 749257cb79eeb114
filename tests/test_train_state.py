"""One step of training against the formulas, on a toy."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from vdm_jax import optim, train_state
from vdm_jax.errors import UserError


def settings(**different):
    base = dict(
        optimizer="adamw",
        accumulate=1,
        steps=20,
        learning_rate=0.1,
        warmup_steps=5,
        weight_decay=0.0,
        beta2=0.99,
        clip_norm=1.0,
        ema=0.9,
    )
    return ml_collections.ConfigDict({**base, **different})


def params():
    return {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}


def loss_fn(p, key, batch, encoder_params):
    """A parabola around the mean of the batch, and a random number that shows the key."""
    value = sum(jnp.sum(jnp.square(x - batch.mean())) for x in p.values()) * encoder_params
    return value, {"loss": value, "draw": jax.random.normal(key)}


def run(steps, state=None, **different):
    """Returns (state, metrics of every step) after `steps` more steps."""
    config = settings(**different)
    step = jax.jit(train_state.make_step(loss_fn, config))
    state, kept = state or train_state.create(params(), config), []
    for _ in range(steps):
        state, metrics = step(state, jax.random.key(7), jnp.ones(4), 2.0)
        kept.append(metrics)
    return state, kept


def test_learning_rate_warms_up_and_decays():
    rate = optim.schedule(settings())
    np.testing.assert_allclose([rate(i) for i in (0, 1, 5)], [0, 0.02, 0.1], rtol=1e-5)
    half = 5 + 15 / 2
    np.testing.assert_allclose(rate(half), 0.05, rtol=1e-5)
    np.testing.assert_allclose(rate(20), 0, atol=1e-8)
    short = optim.schedule(settings(steps=4))  # a warm-up that would outlast the run is half of it
    np.testing.assert_allclose([short(2), short(4)], [0.1, 0], atol=1e-8)
    assert optim.schedule(settings(steps=1))(0) == pytest.approx(0.1)


def test_a_step_says_what_it_did():
    state, kept = run(6)
    assert int(state["step"]) == 6
    np.testing.assert_allclose([m["learning_rate"] for m in kept], [0, 0.02, 0.04, 0.06, 0.08, 0.1], rtol=1e-4)
    # d/dx of 2 sum (x - 1)^2 at the start: 4 (x - 1) = 0, -12 and 8.
    np.testing.assert_allclose(kept[0]["grad_norm"], np.hypot(12, 8), rtol=1e-5)
    np.testing.assert_allclose(kept[0]["loss"], 2 * (0 + 9 + 4), rtol=1e-6)
    assert kept[-1]["loss"] < kept[1]["loss"]
    draws = [float(m["draw"]) for m in kept]
    assert len(set(draws)) == 6  # every step has a key of its own


def test_a_resumed_run_draws_and_ends_as_if_uninterrupted():
    whole, kept = run(9)
    half, _ = run(4)
    resumed, rest = run(5, jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), half))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert [m["draw"] for m in rest] == [m["draw"] for m in kept[4:]]


def test_parts_of_a_batch_make_the_mean_gradient():
    config = settings(accumulate=4)
    batch = jnp.arange(8.0)

    def apart(p, key, batch, encoder_params):
        value = sum(jnp.sum(jnp.square(x - batch.mean())) for x in p.values()) * encoder_params
        return value, {"loss": value, "rare": jnp.where(batch[0] < 1, batch[0] + 2, jnp.nan)}

    gradients = train_state.accumulated(jax.grad(apart, has_aux=True), config.accumulate)
    grads, metrics = jax.jit(gradients)(params(), jax.random.key(0), batch, 2.0)
    # Part i is rows i and i + 4.
    each = [jax.grad(apart, has_aux=True)(params(), None, batch[i::4], 2.0) for i in range(4)]
    for name in grads:
        np.testing.assert_allclose(grads[name], np.mean([g[name] for g, _ in each], 0), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean([m["loss"] for _, m in each]), rtol=1e-6)
    assert metrics["rare"] == 2  # of the one part that measured it


# ------------------------------------------------------------------------------------------------------ bad numbers


def steps_of(batches, loss_over_mean=0.0):
    """Returns [(state, metrics)] after each batch, with the loss batch * sum(p^2)."""

    def loss_fn(p, key, batch, encoder_params):
        value = batch * sum(jnp.sum(jnp.square(x)) for x in p.values())
        return value, {"loss": value}

    config = settings(warmup_steps=0, learning_rate=1e-3)
    step = jax.jit(train_state.make_step(loss_fn, config, loss_over_mean))
    state, kept = train_state.create(params(), config), []
    for batch in batches:
        state, metrics = step(state, jax.random.key(0), jnp.float32(batch), None)
        kept.append((jax.device_get(state), jax.device_get(metrics)))
    return kept


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_step_that_is_not_finite_moves_nothing_but_its_number(bad):
    (before, first), (after, metrics), (third, last) = steps_of([1.0, bad, 1.0])
    assert [m["skipped"] for m in (first, metrics, last)] == [0, 1, 0]
    assert after["step"] == 2 and not np.isfinite(metrics["loss"])
    jax.tree.map(np.testing.assert_array_equal, {**after, "step": 1}, before)
    good = steps_of([1.0, 1.0])[1][
        0
    ]  # equals a run without the bad step, except for the step number and the EMA, whose decay depends on it
    for part in ("params", "opt", "loss_mean"):
        jax.tree.map(np.testing.assert_array_equal, third[part], good[part])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(third))


def test_gradients_alone_may_be_what_is_not_finite():
    def loss_fn(p, key, batch, encoder_params):
        value = jnp.sum(jnp.sqrt(p["x"]))  # 0 at 0, where its slope is infinite
        return value, {"loss": value}

    state = train_state.create({"x": jnp.zeros(2)}, settings())
    after, metrics = train_state.make_step(loss_fn, settings())(state, jax.random.key(0), None, None)
    assert metrics["loss"] == 0 and np.isinf(metrics["grad_norm"]) and metrics["skipped"] == 1
    np.testing.assert_array_equal(after["params"]["x"], 0)


def test_a_spike_of_the_loss_is_skipped_only_where_asked():
    batches = [1.0, 1.0, 2.5, 1.0, 3.5, 1.0]
    assert [m["skipped"] for _, m in steps_of(batches)] == [0] * 6
    kept = steps_of(batches, loss_over_mean=3.0)
    assert [m["skipped"] for _, m in kept] == [0, 0, 0, 0, 1, 0]
    means, losses = [s["loss_mean"] for s, _ in kept], [m["loss"] for _, m in kept]
    np.testing.assert_allclose(means[0], losses[0])
    np.testing.assert_allclose(means[2], 0.98 * means[1] + 0.02 * losses[2], rtol=1e-6)
    assert means[4] == means[3]
    jax.tree.map(np.testing.assert_array_equal, kept[4][0]["params"], kept[3][0]["params"])


def test_moving_average():
    state, _ = run(0)
    ema = jax.tree.map(np.asarray, state["params"])
    for i in range(20):
        state, _ = run(1, state)
        decay = min(0.9, (1 + i) / (10 + i))
        ema = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), ema, state["params"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state["ema"], ema)
    assert (state["ema"]["bias"] != state["params"]["bias"]).all()


def test_only_kernels_decay_and_gradients_are_clipped():
    zero = jax.tree.map(jnp.zeros_like, params())
    optimizer = optim.optimizer(settings(weight_decay=0.5, warmup_steps=0))
    updates, _ = optimizer.update(zero, optimizer.init(params()), params())
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * params()["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(updates["bias"], [0])
    # A gradient of norm 5 counts as one of norm 1: Adam's first moment tells.
    optimizer = optim.optimizer(settings())
    gradient = {"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0])}
    _, state = optimizer.update(gradient, optimizer.init(params()), params())
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moment["kernel"], [[0.06, 0]], rtol=1e-5)
    np.testing.assert_allclose(moment["bias"], [0.08], rtol=1e-5)


def test_muon_moves_every_kernel_by_an_orthogonal_matrix_and_the_rest_as_adam():
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 4, 16), "query": (32, 2, 8), "out": (2, 8, 32)}  # as matrices [36, 16], [32, 16], [16, 32]
    tree = {name: {"kernel": rng.normal(size=s).astype("f"), "bias": np.ones(3, "f")} for name, s in shapes.items()}
    method = optim.optimizer(settings(optimizer="muon", warmup_steps=0, clip_norm=1e9))
    updates, _ = method.update(tree, method.init(tree), tree)
    for name, rows in (("conv", 36), ("query", 32), ("out", 16)):
        matrix = np.asarray(updates[name]["kernel"]).reshape(rows, -1)
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.min() / values.max() > 0.5  # of the random gradient: below 0.35
        np.testing.assert_allclose(np.sqrt(np.mean(matrix**2)), 0.2 * 0.1, rtol=0.2)  # 0.2 of the learning rate
        # Adam with Nesterov momentum (Dozat 2016): its first step is (1 + 0.9 * 0.1 / (1 - 0.9^2)) times the rate.
        np.testing.assert_allclose(updates[name]["bias"], -0.1 * (1 + 0.09 / 0.19), rtol=1e-3)


def test_muon_begins_as_that_of_optax_which_takes_kernels_one_by_one():
    rng = np.random.default_rng(1)
    shapes = {"a": (3, 3, 4, 16), "b": (16, 36), "c": (36, 16), "query": (32, 2, 8), "out": (2, 8, 32)}
    inputs = {"a": 3, "b": 1, "c": 1, "query": 1, "out": 2}  # of the axes, the first so many
    tree = {name: {"kernel": rng.normal(size=s).astype("f")} for name, s in shapes.items()}
    ours = optim.optimizer(settings(optimizer="muon", warmup_steps=0, weight_decay=0.1, clip_norm=1e9))
    axes = {
        n: {"kernel": optax.contrib.MuonDimensionNumbers(tuple(range(i)), tuple(range(i, len(shapes[n]))))}
        for n, i in inputs.items()
    }
    theirs = optax.contrib.muon(0.1, weight_decay=0.1, consistent_rms=0.2, muon_weight_dimension_numbers=axes)
    mine, other = (method.update(tree, method.init(tree), tree)[0] for method in (ours, theirs))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), mine, other)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="no optimizer 'sgd'.*known: adamw, muon"):
        optim.optimizer(settings(optimizer="sgd"))
