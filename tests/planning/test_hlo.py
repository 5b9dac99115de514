"""Collectives read from the text of compiled programs."""

import pytest

from prompt_tuning_jax.planning.hlo import Collective, collectives

MESH = {"data": 4, "fsdp": 1, "model": 4}


def program(*lines: str) -> str:
    return "\n".join(["ENTRY %main (p: f32[2]) -> f32[2] {", *(f"  {x}" for x in lines), "}"])


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", ("model",), 4),
        ("[4,4]<=[16]", ("model",), 4),
        ("[4,4]<=[4,4]T(1,0)", ("data",), 4),
        ("[1,16]<=[16]", ("data", "model"), 16),
        ("mesh['axis_0'=4,'axis_1'=4,'axis_2'=1] {'axis_1'}", ("model",), 4),
        ("mesh['axis_0'=4,'axis_1'=4] {'axis_0'}", ("data",), 4),
        ("{}", ("data", "model"), 16),
    ],
)
def test_every_way_of_writing_groups(groups, axes, size):
    line = f"%r = bf16[8,64]{{1,0}} all-reduce(%p), replica_groups={groups}, to_apply=%add"
    (found,) = collectives(program(line), MESH)
    assert found == Collective(kind="all-reduce", axes=axes, group=size, count=1, bytes=1024)


def test_started_ones_count_once_and_by_their_result():
    text = program(
        "%s = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%p), replica_groups=[4,4]<=[16]",
        "%d = f32[16,8]{1,0} all-gather-done(%s)",
        "%q = (f32[4]{0:T(128)}, f32[6]{0}) all-reduce(%a, %b), replica_groups=[4,4]<=[16]",
        "%t = f32[4,8]{1,0} reduce-scatter(%u), replica_groups=[4,4]<=[16]",
    )
    found = {each.kind: each for each in collectives(text, MESH)}
    assert found["all-gather"].bytes == 16 * 8 * 4 and found["all-gather"].count == 1
    assert found["all-reduce"].bytes == 40
    assert found["reduce-scatter"].bytes == 4 * 8 * 4 * 4


def test_loops_count_as_often_as_they_run():
    text = "\n".join(
        [
            "%body (p: f32[2]) -> f32[2] {",
            "  %r = f32[2]{0} all-reduce(%p), replica_groups=[4,4]<=[16], to_apply=%add",
            "}",
            "",
            program(
                '%w = f32[2]{0} while(%p), condition=%test, body=%body, backend_config={"known_trip'
                '_count":{"n":"5"}}'
            ),
        ]
    )
    (found,) = collectives(text, MESH)
    assert (found.count, found.bytes) == (5, 40)


def test_a_group_of_one_sends_nothing():
    line = "%r = f32[8]{0} all-reduce(%p), replica_groups=[16,1]<=[16], to_apply=%add"
    assert collectives(program(line), MESH) == []


def test_what_a_ring_sends():
    def sent(kind):
        return Collective(kind=kind, axes=("model",), group=4, count=1, bytes=400).sent

    assert sent("all-reduce") == 600
    assert sent("all-gather") == sent("reduce-scatter") == 300
    assert sent("collective-permute") == 400
