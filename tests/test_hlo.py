"""The reader of compiled programs: a text as the TPU compiler writes it, and programs that this machine compiles."""

import jax
import jax.numpy as jnp
import pytest

from vdm_jax.perf import hlo

TPU = """HloModule jit_step, is_scheduled=true

%fused (param_1.1: bf16[8,16], param_0.1: f32[4,32,16]) -> bf16[8,8] {
  %param_1.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(1)
  %param_0.1 = f32[4,32,16]{2,1,0:T(8,128)} parameter(0)
  %slice.1 = f32[1,16,8]{2,1,0} slice(%param_0.1), slice={[0:1], [0:16], [0:8]}
  %bitcast.1 = bf16[16,8]{1,0} bitcast(%slice.1)
  ROOT %convolution.1 = bf16[8,8]{1,0} convolution(%param_1.1, %bitcast.1), dim_labels=bf_io->bf
}

%add (left: f32[], right: f32[]) -> f32[] {
  %left = f32[]{:T(128)} parameter(0)
  %right = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%left, %right)
}

%all-reduce-scatter.1 (input: f32[64]) -> f32[16] {
  %input = f32[64]{0:T(128)} parameter(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%input), replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add
  ROOT %piece = f32[16]{0} slice(%all-reduce.1), slice={[0:16]}
}

%body (state: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %state = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %y = bf16[8,16]{1,0:T(8,128)(2,1)} negate(%x)
  ROOT %out = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%x, %y)
}

%condition (state.1: (s32[], bf16[8,16])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %less = pred[]{:T(512)} constant(true)
}

ENTRY %main (a: f32[4,32,16], b: bf16[8,16], c: f32[64]) -> bf16[8,8] {
  %a = f32[4,32,16]{2,1,0:T(8,128)} parameter(0)
  %b = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(1)
  %c = f32[64]{0:T(128)} parameter(2)
  %near = f32[64]{0:T(128)S(1)} copy(%c)
  %gather = f32[256]{0:T(128)} all-gather(%c), replica_groups=[2,4]<=[8], dimensions={0}
  %scatter = f32[16]{0:T(128)} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
  %permute = (f32[64]{0}, f32[64]{0}, u32[]{:S(2)}) collective-permute-start(%c), source_target_pairs={{0,1},{1,0}}
  %permuted = f32[64]{0} collective-permute-done(%permute)
  %start = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%c, %b)
  %loop = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body,
      backend_config={"known_trip_count":{"n":"5"}}
  ROOT %product = bf16[8,8]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused, metadata={op_name="x"}
}
""".replace(",\n      backend_config", ", backend_config")


def test_a_tpu_program_is_read():
    found = {operation.name: operation for operation in hlo.operations(TPU)}
    assert set(found) == {"near", "gather", "scatter", "permute", "y", "product"}
    assert found["near"].bytes == 256  # of the operand; S(1) is not main memory, so the result does not count
    assert found["gather"].collectives == {"all-gather": 3 * 256}
    assert found["scatter"].collectives == {"reduce-scatter": 192}
    assert found["permute"].collectives == {"collective-permute": 256}
    assert (found["y"].times, found["y"].bytes) == (5, 2 * 256)
    assert found["product"].flops == 2 * 8 * 8 * 16
    assert found["product"].bytes == 4 * 16 * 8 + 2 * 8 * 16 + 2 * 8 * 8  # a slice of `a`, `b`, the result


def flops(function, *shapes):
    compiled = jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)).compile()
    return sum(operation.times * operation.flops for operation in hlo.operations(compiled.as_text()))


def test_products_and_loops_are_counted():
    assert flops(lambda a, b: a @ b, (64, 96), (96, 32)) == pytest.approx(2 * 64 * 96 * 32)

    def loop(a, b):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ b), None), a, None, length=7)[0]

    assert flops(loop, (64, 96), (96, 96)) == pytest.approx(7 * 2 * 64 * 96 * 96)


@pytest.mark.parametrize("strides, padding, met", [
    ((1, 1), [(0, 0), (0, 0)], 6 * 8 * 9),
    ((2, 2), [(0, 0), (0, 0)], 3 * 4 * 9),
    ((1, 1), [(1, 1), (1, 1)], (3 * 8 - 2) * (3 * 10 - 2)),
])  # fmt: skip
def test_convolutions_are_counted_without_their_padding(strides, padding, met):
    def conv(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops(conv, (2, 8, 10, 4), (3, 3, 4, 5)) == 2 * 2 * met * 4 * 5


def test_groups_of_devices():
    assert hlo.group_size("replica_groups={{0,1,2},{3,4,5}}, more") == 3
    assert hlo.group_size("replica_groups=[16,4]<=[64]") == 4
    assert hlo.group_size("replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}") == 4
    turned = "replica_groups=mesh['axis_0'=1,'axis_1'=16,'axis_2'=8], device_ids=([8,16]T(1,0)) {'axis_1'}"
    assert hlo.group_size(turned) == 16
