"""The account of a request: who was asked, what they said, and who may not answer any more."""

from __future__ import annotations

from kachery_fast.protocol.inquiry import Inquiry

OWNER, OTHER = "a" * 64, "b" * 64


def test_the_last_word_of_who_may_not_provide_any_more_does_not_stand() -> None:
    account = Inquiry("sha1://x", "lab", {OWNER: "rig", OTHER: "desk"}, rounds=1)
    account.note(OWNER, "offered it")
    account.change_providers({OTHER: "desk"})
    assert "; rig (aaaaaaaa): may not provide it any more; no answer from desk (bbbbbbbb)" in account.tried()
    assert "asked 1 node once" in account.tried()
    assert account.to_dict()["answers"] == [{"node": OWNER, "label": "rig", "answer": "may not provide it any more"}]
    account.change_providers({OWNER: "rig", OTHER: "desk"})  # the leave came back, and with it no word
    assert account.answers == {}
    assert "no answer from rig (aaaaaaaa), desk (bbbbbbbb)" in account.tried()


def test_who_never_answered_goes_without_a_word_and_others_keep_theirs() -> None:
    account = Inquiry("sha1://x", "lab", {OWNER: "rig", OTHER: "desk"}, rounds=2)
    account.note(OTHER, "offered it")
    for _ in range(2):
        account.change_providers({OTHER: "desk"})
    assert account.answers == {OTHER: "offered it"}
    account.change_providers({})
    account.change_providers({})
    assert account.tried().endswith("asked 0 nodes 2 times; desk (bbbbbbbb): may not provide it any more")


def test_an_answer_that_crossed_the_loss_of_leave_is_forgotten_when_the_leave_comes_back() -> None:
    account = Inquiry("sha1://x", "lab", {OWNER: "rig"}, rounds=1)
    account.note(OWNER, "offered it")
    account.change_providers({})
    account.note(OWNER, "was looking it up")
    account.change_providers({OWNER: "rig"})
    assert account.answers == {}
