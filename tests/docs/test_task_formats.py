"""The results and receipts of tasks on the page are ones that the program believes."""

from __future__ import annotations

import json

from kachery_fast.protocol.tasks import check_receipt, check_result, check_task_id, task_id
from tests.docs.test_pages import ROOT, blocks, wire_examples

PAGE = ROOT / "docs" / "formats.md"
LAB = "lab"


def test_the_result_on_the_page_is_one() -> None:
    [text] = [block.strip() for block in blocks(PAGE, "text") if '"taskResult"' in block]
    found = json.loads(text)["body"]["task"]
    result = check_result(text.encode(), found, LAB)
    assert result.task == task_id(result.function, result.kwargs)
    assert result.result == {"json": {"rate_hz": 12.0, "spikes": 7200}}


def test_the_receipt_on_the_page_is_one() -> None:
    [example] = [json.loads(block) for block in blocks(PAGE, "json") if '"taskReceipt"' in block]
    receipt = check_receipt(example, LAB, example["body"]["task"])
    assert (receipt.outcome, receipt.node_id) == ("error", example["body"]["node"])


def test_the_tasks_that_are_asked_for_on_the_page_have_their_ids() -> None:
    [asked] = [example for example in wire_examples() if example["type"] == "taskRequest"]
    assert check_task_id(asked["kind"], asked["task"]) == task_id(asked["function"], asked["kwargs"])
