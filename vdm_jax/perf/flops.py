"""Counts the floating-point operations (FLOPs) of a model from shapes, and knows the peak FLOP/s of devices.

A matrix product or a convolution costs 2 FLOPs for each multiply-add. The backward pass costs the same again for each
operand that depends on the trained parameters, because one more product gives the gradient of that operand. A layer in
the middle of a trained network therefore counts three times, and its first layer counts twice. Attention between
activations counts three times. A frozen encoder counts once.

The count leaves out recomputation (rematerialization), optimizers, pointwise operations, and everything that no result
depends on. It is the number of *model* FLOPs of arXiv:2204.02311, appendix B.
"""

import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Dense bfloat16 TFLOP/s of one device, from its maker's data sheet. The first name that `device_kind` contains counts.
PEAK_TFLOPS = {
    "TPU v6": 918,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,  # the `device_kind` of a v5p
    "TPU v4": 275,
    "H200": 989,
    "H100": 989,
    "A100": 312,
}


def peak(device):
    """Returns the peak bfloat16 FLOP/s of a device, or None for an unknown device."""
    kind = device.device_kind
    return next((1e12 * tflops for name, tflops in PEAK_TFLOPS.items() if name in kind), None)


def count(function, trained, *arguments):
    """Returns (FLOPs of function(trained, *arguments), FLOPs of that and its gradient by `trained`).

    A loop body counts once for each iteration. A function under `shard_map` counts with the shapes of one device, so
    count with no mesh set.

    function: anything that JAX can trace. A jitted function keeps the jaxpr of its first call, so count the function
        inside it where `models` choose another form of a layer for each kind of device.
    trained, arguments: trees of arrays or ShapeDtypeStructs.

    Raises NotImplementedError for a `while` loop with products, because no shape gives its number of iterations.
    """
    jaxpr = jax.make_jaxpr(function)(trained, *arguments)
    parameters = len(jax.tree.leaves(trained))
    depends = [i < parameters for i in range(len(jaxpr.in_avals))]
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals), instantiate=True)
    forward, both, _ = _count(used, depends)
    return forward, both


def _count(jaxpr, depends):
    """Returns (forward FLOPs, forward and backward FLOPs, which outputs depend on `trained`).

    depends: which inputs of the jaxpr depend on `trained`, as a list of bools.
    """
    known = dict(zip(jaxpr.invars, depends, strict=True))

    def is_trained(atom):
        return not isinstance(atom, core.Literal) and known.get(atom, False)

    forward = both = 0
    for eqn in jaxpr.eqns:
        inputs = [is_trained(atom) for atom in eqn.invars]
        outputs = [any(inputs)] * len(eqn.outvars)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            cost = _product_flops(eqn)
            forward += cost
            both += cost * (1 + sum(inputs))
        elif bodies := _bodies(eqn):
            costs = [_count(body, _body_inputs(eqn, body, inputs)) for body in bodies]
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            if eqn.primitive.name == "while" and any(cost[0] for cost in costs):
                raise NotImplementedError("products in a loop of unknown length")
            # Of the branches of a condition, the most expensive branch counts.
            forward += times * max(cost[0] for cost in costs)
            both += times * max(cost[1] for cost in costs)
            outputs = [any(branches) for branches in zip(*(cost[2] for cost in costs))]
        known.update(zip(eqn.outvars, outputs))
    return forward, both, [is_trained(atom) for atom in jaxpr.outvars]


def _bodies(eqn):
    """Returns the jaxprs inside an equation: the body of a loop, the branches of a condition, or a called function."""
    names = ("jaxpr", "call_jaxpr", "body_jaxpr")
    bodies = eqn.params.get("branches") or [eqn.params[name] for name in names if name in eqn.params]
    return [getattr(body, "jaxpr", body) for body in bodies]


def _body_inputs(eqn, body, inputs):
    """Returns which inputs of a body depend on `trained`. inputs: the same of its equation."""
    if eqn.primitive.name == "cond":
        return inputs[1:]  # the first input is the number of the branch
    if eqn.primitive.name == "while":
        return inputs[eqn.params["cond_nconsts"] :]
    if eqn.primitive.name == "scan":
        # Inputs and outputs of a scan begin with constants and the carry. What is sliced or stacked comes after them,
        # and has one more axis outside the body than inside.
        carried = sum(a.aval.shape == b.aval.shape for a, b in zip(eqn.outvars, body.outvars))
        end = sum(a.aval.shape == b.aval.shape for a, b in zip(eqn.invars, body.invars))
        outputs = _count(body, inputs)[2]  # the next iteration reads the carry of this iteration
        carry = [a or b for a, b in zip(inputs[end - carried : end], outputs)]
        return inputs[: end - carried] + carry + inputs[end:]
    return inputs


def _product_flops(eqn):
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(left[i] for i in contracted)
    output_axis = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * out * math.prod(right) // right[output_axis]  # window times input channels of one group
