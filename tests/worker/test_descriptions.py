"""Questions about files go to the worker beside its jobs, and come to an answer whatever it does."""

from __future__ import annotations

from kandinsky5.worker.descriptions import KEPT, TRIES, WORKER_GONE, Descriptions
from kandinsky5.worker.protocol import FileNames

A, B = FileNames("demo-t2v", dit="a"), FileNames("demo-t2v", dit="b")


def test_a_question_is_sent_once_and_its_answer_kept() -> None:
    asked = Descriptions()
    assert asked.ask(A) == (None, True)
    assert asked.ask(A) == (None, False)
    assert asked.to_send() == (A,)
    assert (asked.to_send(), asked.are_waiting) == ((), False)
    asked.note(A, {"dit": None})
    assert asked.ask(A) == ({"dit": None}, False)
    assert asked.ask(FileNames("demo-t2v", dit="a", stamps=((1, 2),))) == (None, True)


def test_a_question_that_workers_do_not_survive_is_given_up() -> None:
    asked = Descriptions()
    asked.ask(A)
    for _ in range(TRIES):
        assert asked.to_send() == (A,)
        asked.worker_is_gone()
    assert asked.to_send() == ()
    assert asked.ask(A) == (WORKER_GONE, False)


def test_answers_do_not_pile_up() -> None:
    asked = Descriptions()
    for number in range(KEPT + 1):
        asked.note(FileNames("demo-t2v", dit=str(number)), {})
    assert asked.ask(FileNames("demo-t2v", dit="0")) == (None, True)
    assert asked.ask(FileNames("demo-t2v", dit=str(KEPT))) == ({}, False)
