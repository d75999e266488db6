"""What lies ahead of the computing: every streamed block once a pass, and nothing behind the last one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kandinsky5.memory.course import Course

BLOCKS = 7


def walked(course: Course, indices: list[int]) -> list[list[int]]:
    """What is ahead of each block when it computes."""
    found = []
    for index in indices:
        course.go_to(index)
        found.append(course.ahead(3))
    return found


def test_without_an_end_blocks_come_round_and_round() -> None:
    course = Course((1, 2, 5))
    assert walked(course, [0, 1, 2]) == [[1, 2, 5], [1, 2, 5], [2, 5, 1]]
    assert walked(course, [3, 5, 6]) == [[5, 1, 2], [5, 1, 2], [1, 2, 5]]
    assert walked(course, [0, 1]) == [[1, 2, 5], [1, 2, 5]]


def test_behind_the_last_pass_comes_nothing_until_more_are_expected() -> None:
    course = Course((1, 2, 5), passes=1)
    assert walked(course, [0, 2, 5, 6]) == [[1, 2, 5], [2, 5], [5], []]
    course.end_pass()
    assert course.ahead(3) == [] and course.at(course.position) is None
    course.expect(2)
    assert course.ahead(5) == [1, 2, 5, 1, 2]
    course.expect(None)
    assert course.ahead(5) == [1, 2, 5, 1, 2]


def test_a_pass_more_than_expected_counts_as_the_last_one() -> None:
    course = Course((0, 1, 2), passes=1)
    walked(course, [0, 1, 2])
    assert walked(course, [0, 1, 2]) == [[0, 1, 2], [1, 2], [2]]


def test_nothing_streamed_is_nothing_ahead() -> None:
    course = Course(())
    course.go_to(3)
    assert course.ahead(2) == [] and course.at(0) is None


@settings(max_examples=100)
@given(
    order=st.lists(st.integers(0, BLOCKS - 1), min_size=1, unique=True).map(sorted),
    passes=st.integers(1, 4),
    slots=st.integers(1, 4),
    told=st.booleans(),
)
def test_every_streamed_block_is_ahead_once_a_pass(
    order: list[int], passes: int, slots: int, told: bool
) -> None:
    course = Course(order, passes)
    seen = 0
    for _ in range(passes):
        for index in range(BLOCKS):
            course.go_to(index)
            ahead = course.ahead(slots)
            assert len(ahead) == min(slots, passes * len(order) - course.position)
            assert [course.position_of(block) for block in dict.fromkeys(ahead)] == list(
                range(course.position, course.position + len(dict.fromkeys(ahead)))
            )
            if index in order:
                assert ahead[0] == index == course.at(course.position)
                seen += 1
        if told:
            course.end_pass()
    assert seen == passes * len(order)
    course.end_pass()
    assert course.ahead(slots) == []


def test_a_block_that_is_not_streamed_has_no_position() -> None:
    with pytest.raises(ValueError, match="not in"):
        Course((1, 2)).position_of(0)
