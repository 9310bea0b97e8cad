"""The counter of collectives: loops, asynchronous pairs, transfers between slices, and groups that leave a host."""

import pytest

from duplex_jax import parallel
from duplex_jax.train import collectives

HLO = """HloModule m
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %limit = s32[]{:T(128)} constant(40)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = bf16[16,64]{1,0} all-gather(%x), replica_groups=[4,4]<=[16], dimensions={0}
  %r = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%inner
  %d = f32[2,4]{1,0} reduce-scatter(%y), replica_groups=mesh['a'=1,'b'=16] {'b'}, to_apply=%add
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w2 = (s32[], f32[8]) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[8]{0}, f32[32]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4]
  %e = f32[32]{0} all-gather-done(%s)
}
"""


def test_collectives_are_counted_through_loops():
    spec = parallel.load_mesh_spec("v5e-16")
    found = collectives.read(HLO, spec)
    counts = collectives.by_kind(found)
    assert counts["all-gather"] == (5 * 40 + 1, pytest.approx(5 * 40 * 16 * 64 * 2 * 3 / 4 + 32 * 4 * 3 / 4))
    assert counts["all-reduce"] == (5 * 40, pytest.approx(5 * 40 * 2 * (4 + 4) * 4 * 3 / 4))
    assert counts["reduce-scatter"] == (5, pytest.approx(5 * 8 * 4 * 15))
    seconds = sum(size for _, size in counts.values()) / spec.chip.link
    assert collectives.seconds(found, spec) == pytest.approx(seconds)


def test_groups_of_equal_size_are_told_apart():
    """On eight hosts of eight GPUs both fsdp and data join eight devices: one host's, and one of each."""
    spec = parallel.load_mesh_spec("h100x64")
    ways = {
        "replica_groups=[8,8]<=[64]": (list(range(8)), True),
        "replica_groups=[8,8]<=[8,8]T(1,0)": (list(range(0, 64, 8)), False),
        "replica_groups={{0,8,16},{1,9,17}}": ([0, 8, 16], False),
        "replica_groups=mesh['a'=8,'b'=8] {'b'}": (list(range(8)), True),
        "replica_groups=mesh['a'=8,'b'=8] {'a'}": (list(range(0, 64, 8)), False),
        "replica_groups=mesh['a'=1,'b'=8,'c'=8], device_ids=([8,8]T(1,0)) {'b'}, x={}": (list(range(8)), True),
        "replica_groups=mesh['a'=1,'b'=8,'c'=8], device_ids=([8,8]T(1,0)) {'c'}": (list(range(0, 64, 8)), False),
        "source_target_pairs={{0,1},{1,0}}": ([0, 1], True),
        "channel_id=1": (list(range(64)), False),
    }
    for line, (group, local) in ways.items():
        first, *others = collectives._groups(line, spec)
        assert first == group
        assert all(collectives._near(g, spec) for g in (first, *others)) is local


ASYNC = """HloModule m
%gather (x: f32[8]) -> f32[32] {
  ROOT %g = f32[32]{0} all-gather(%x), replica_groups=[8,4]<=[32], dimensions={0}
}
%cond (p: (u32[], f32[8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(7)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
%body (p: (u32[], f32[8])) -> (u32[], f32[8]) {
  %s = ((f32[8]), f32[32], u32[]) async-start(%x), calls=%gather
  %u = ((f32[8]), f32[32], u32[]) async-update(%s), calls=%gather
  %d = f32[32] async-done(%u), calls=%gather
  %p = (bf16[64]{0}, bf16[64]{0}) collective-permute-start(%y), source_target_pairs={{0,1},{1,0},{2,3}}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (u32[], f32[8]) while(%t), condition=%cond, body=%body
  %send = (bf16[16,8]{1,0:T(8,128)}, u32[], token[]) send(%g, %a), is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %other = (f32[4], u32[], token[]) send(%h, %a), is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="callback"}
}
"""  # noqa: E501


def test_each_asynchronous_operation_counts_once():
    """Its start, updates and end name the same computation; loops may count in u32; hosts carry what leaves a slice."""
    spec = parallel.load_mesh_spec("v5e-16x2")
    found = collectives.read(ASYNC, spec)
    assert collectives.by_kind(found) == {
        "all-gather": (7, 7 * 32 * 4 * 3 / 4),
        "collective-permute": (7, 7 * 64 * 2),
        collectives.BETWEEN_SLICES: (1, 16 * 8 * 2),  # 2 (n - 1) / n of it, over two slices
    }
    assert [c.near for c in found] == [True, True, False]


def test_one_pair_that_leaves_a_host_is_enough():
    spec = parallel.load_mesh_spec("a100x40")
    line = (
        "ENTRY %main (x: f32[8]) -> f32[8] {\n  %p = f32[8] collective-permute(%x), source_target_pairs={{0,1},{7,8}}\n"
    )
    (found,) = collectives.read(line, spec)
    assert not found.near
