"""Damaged inputs of every command, made at random: one clear error or success, nothing left over, and no hang."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from whole_inputs import COMMANDS, Case, damaged_case

FEW, MANY = range(45), range(1000, 2200)
"""Numbers of damaged commands; the same number is the same damage."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS)
def test_without_damage_a_command_succeeds(words: str, stock: Path, tmp_path: Path) -> None:
    outcome = Case(stock, words, tmp_path / "case").run("none")
    assert outcome.code == (1 if words.startswith("push") else 0) and not outcome.wrong, outcome


@pytest.mark.parametrize("numbers", [FEW, pytest.param(MANY, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_damage_is_one_clear_error_or_none_and_leaves_nothing(numbers: range, stock: Path, tmp_path: Path) -> None:
    outcomes = [damaged_case(stock, tmp_path, number) for number in numbers]
    assert [str(one) for one in outcomes if one.wrong] == []
    codes = {one.code for one in outcomes}
    assert codes == {0, 1, 2}, "the damage has to reach what it is meant for"
