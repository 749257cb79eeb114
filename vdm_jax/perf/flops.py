"""Floating-point operations that a model's definition asks for, counted from shapes; and what devices can do.

A product of matrices, or a convolution, costs 2 operations for each multiply-add. Differentiating it costs as much
again for each operand that depends on the parameters being trained: one more product gives the gradient of that
operand. So a layer in the middle of a trained network counts three times, its first layer twice, attention between
activations three times, a frozen encoder once. Recomputation (rematerialisation), optimizers and pointwise work are
left out, as is what no result is made of: these are the *model* FLOPs of arXiv:2204.02311, appendix B.
"""

import math

import jax
from jax.extend import core
from jax.interpreters import partial_eval

# Dense bfloat16 TFLOP/s of one device, as its maker states it; the first name found in `device_kind` counts.
PEAK_TFLOPS = {
    "TPU v6": 918,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,  # v5p calls itself so
    "TPU v4": 275,
    "H200": 989,
    "H100": 989,
    "A100": 312,
}


def peak(device):
    """Peak FLOP/s of a device in bfloat16, or None where it is not known."""
    kind = device.device_kind
    return next((1e12 * tflops for name, tflops in PEAK_TFLOPS.items() if name in kind), None)


def count(function, trained, *arguments):
    """FLOPs of function(trained, *arguments), and of its gradient by `trained`: -> (forward, forward and backward).

    trained, arguments: trees of arrays or ShapeDtypeStructs. Loops count as often as they run; `while` loops whose
    length no shape tells raise NotImplementedError if there are products in them.
    """
    jaxpr = jax.make_jaxpr(function)(trained, *arguments)
    parameters = len(jax.tree.leaves(trained))
    depends = [i < parameters for i in range(len(jaxpr.in_avals))]
    used, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals), instantiate=True)
    forward, both, _ = _count(used, depends)
    return forward, both


def _count(jaxpr, depends):
    """-> (forward FLOPs, with gradients, which outputs depend on what is trained); depends: the same of the inputs."""
    known = dict(zip(jaxpr.invars, depends, strict=True))

    def reads(atom):
        return not isinstance(atom, core.Literal) and known.get(atom, False)

    forward = both = 0
    for eqn in jaxpr.eqns:
        inputs = [reads(atom) for atom in eqn.invars]
        outputs = [any(inputs)] * len(eqn.outvars)
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            cost = _products(eqn)
            forward, both = forward + cost, both + cost * (1 + sum(inputs))
        elif bodies := _bodies(eqn):
            costs = [_count(body, _inputs(eqn, body, inputs)) for body in bodies]
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            if eqn.primitive.name == "while" and any(cost[0] for cost in costs):
                raise NotImplementedError("products in a loop of unknown length")
            forward += times * max(cost[0] for cost in costs)  # of the branches of a condition, the dearest
            both += times * max(cost[1] for cost in costs)
            outputs = [any(told) for told in zip(*(cost[2] for cost in costs))]
        known.update(zip(eqn.outvars, outputs))
    return forward, both, [reads(atom) for atom in jaxpr.outvars]


def _bodies(eqn):
    """The programs inside an equation: the body of a loop, the branches of a condition, a called function."""
    names = ("jaxpr", "call_jaxpr", "body_jaxpr")
    found = eqn.params.get("branches") or [eqn.params[name] for name in names if name in eqn.params]
    return [getattr(body, "jaxpr", body) for body in found]


def _inputs(eqn, body, inputs):
    """Which inputs of a body depend on what is trained, from which inputs of its equation do."""
    if eqn.primitive.name == "cond":
        return inputs[1:]  # less the number of the branch
    if eqn.primitive.name == "while":
        return inputs[eqn.params["cond_nconsts"] :]
    if eqn.primitive.name == "scan":  # what a step carries over, the next one reads
        carried = _same_shapes(eqn.outvars, body.outvars)  # what is stacked or sliced has an axis more outside
        first = _same_shapes(eqn.invars, body.invars) - carried
        told = _count(body, inputs)[2]
        again = [a or b for a, b in zip(inputs[first : first + carried], told[:carried])]
        return inputs[:first] + again + inputs[first + carried :]
    return inputs


def _same_shapes(outside, inside):
    return sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside))


def _products(eqn):
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    out = math.prod(eqn.outvars[0].aval.shape)
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * out * math.prod(left[i] for i in contracted)
    outputs = eqn.params["dimension_numbers"].rhs_spec[0]
    return 2 * out * math.prod(right) // right[outputs]  # window times input channels of one group
