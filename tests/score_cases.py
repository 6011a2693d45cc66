"""What several test files of this subject share."""

from __future__ import annotations

from tests.conftest import SHARED

HUMANEVAL = SHARED / "humaneval" / "HumanEval.jsonl.gz"


MBPP = SHARED / "mbpp" / "mbpp.jsonl"
