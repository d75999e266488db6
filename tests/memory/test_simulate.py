"""The schedule of copies: as fast as two queues can be, with both invariants, under any timings (A3)."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5.memory.layout import spread
from kandinsky5.memory.simulate import Schedule, Timeline, Work, simulate

SECONDS = st.floats(0.001, 1.0)
ROUNDING_S = 1e-9


@settings(max_examples=60)
@given(compute_s=SECONDS, copy_s=SECONDS, blocks=st.integers(4, 40), slots=st.integers(2, 3))
def test_the_total_is_the_longer_of_the_two_sums_plus_one_block_at_most(
    compute_s: float, copy_s: float, blocks: int, slots: int
) -> None:
    line = simulate(
        Schedule(lambda step, index: compute_s, lambda n: copy_s, blocks=blocks, slots=slots)
    )
    needed_copies_s = copy_s * 2 * blocks
    one_block_s = max(compute_s, copy_s)
    assert line.total_s <= max(line.compute_s, needed_copies_s) + one_block_s + ROUNDING_S
    if compute_s >= copy_s:
        assert line.stall_s <= copy_s + ROUNDING_S, (
            "nothing but the arrival of the very first block"
        )


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 4),
    resident=st.integers(0, 6),
    from_disk=st.booleans(),
    ring=st.integers(1, 3),
    host_waits=st.booleans(),
)
def test_no_slot_is_reused_and_no_block_computes_too_early_under_random_timings(
    seed: int, slots: int, resident: int, from_disk: bool, ring: int, host_waits: bool
) -> None:
    chance = random.Random(seed)
    line = simulate(
        Schedule(
            lambda step, index: chance.choice((0.0, chance.random(), 5 * chance.random())),
            lambda n: chance.choice((0.0, chance.random(), 5 * chance.random())),
            (lambda n: chance.random() * 2) if from_disk else None,
            blocks=12,
            slots=slots,
            ring=ring,
            resident=spread(resident, 12),
            host_waits=host_waits,
        )
    )
    assert line.violations() == []
    assert line.total_s >= line.compute_s
    assert abs(line.compute_s + line.stall_s - line.total_s) < 1e-6
    assert line.traffic.loads == 2 * (12 - resident)


def best_possible_s(compute_s: list[float], copy_s: list[float], slots: int) -> float:
    """When everything is done if every copy begins as soon as queue and slot allow: written down apart."""
    computed, copied = [], []
    for index in range(len(compute_s)):
        slot_free = computed[index - slots] if index >= slots else 0.0
        copied.append(max(copied[-1] if copied else 0.0, slot_free) + copy_s[index])
        computed.append(max(computed[-1] if computed else 0.0, copied[index]) + compute_s[index])
    return computed[-1]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), slots=st.integers(1, 4))
def test_no_schedule_with_these_queues_and_slots_is_faster(seed: int, slots: int) -> None:
    chance = random.Random(seed)
    compute_s = [chance.random() for _ in range(24)]
    copy_s = [chance.random() for _ in range(24 + slots)]
    line = simulate(
        Schedule(
            lambda step, index: compute_s[12 * step + index], copy_s.__getitem__, None, 12, 2, slots
        )
    )
    assert line.total_s == pytest.approx(best_possible_s(compute_s, copy_s, slots))


def test_a_disk_slower_than_the_link_is_hidden_too_where_computing_takes_longer() -> None:
    line = simulate(Schedule(lambda s, i: 0.14, lambda n: 0.021, lambda n: 0.09, steps=3))
    assert line.stall_s <= 0.01 * line.compute_s
    assert line.violations() == []


def test_a_disk_slower_than_computing_is_never_idle() -> None:
    line = simulate(Schedule(lambda s, i: 0.05, lambda n: 0.02, lambda n: 0.2, blocks=30, steps=2))
    assert line.total_s <= 60 * 0.2 + 0.02 + 0.05 + ROUNDING_S


def test_the_second_step_finds_its_first_blocks_already_there() -> None:
    line = simulate(Schedule(lambda s, i: 0.1, lambda n: 0.1, blocks=10, steps=2))
    assert line.steps[1].stall_s < ROUNDING_S


def test_with_one_slot_copies_and_computing_take_turns() -> None:
    line = simulate(Schedule(lambda s, i: 0.1, lambda n: 0.05, blocks=10, steps=1, slots=1))
    assert line.stall_s == pytest.approx(10 * 0.05)


def test_resident_blocks_take_their_share_of_the_link() -> None:
    def total_s(resident: int) -> float:
        schedule = Schedule(
            lambda s, i: 0.01, lambda n: 0.02, blocks=20, resident=spread(resident, 20)
        )
        return simulate(schedule).total_s

    assert total_s(10) < 0.55 * total_s(0)


@pytest.mark.parametrize(
    ("copies", "computing", "words"),
    [
        ([], [Work(0, 1, 0.0, 1.0)], "before its copy"),
        ([Work(0, 1, 0.0, 2.0)], [Work(0, 1, 1.0, 3.0)], "before its copy"),
        ([Work(0, 2, 0.0, 1.0)], [Work(0, 1, 1.0, 3.0)], "before its copy"),
        ([Work(0, 1, 0, 1), Work(0, 2, 2.0, 4.0)], [Work(0, 1, 1.0, 3.0)], "overwritten"),
    ],
)
def test_broken_invariants_are_seen(copies, computing, words) -> None:
    line = Timeline(
        tuple(copies),
        tuple(computing),
        0,
        0,
        0,
        0,
        simulate(Schedule(lambda s, i: 1, lambda n: 1)).traffic,
        (),
    )
    assert any(words in fault for fault in line.violations())
