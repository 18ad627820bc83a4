"""Damaged and forged files at random, a few of those that ``python tests/support/fuzz_load.py`` makes."""

import fuzz_load


def test_forged_files_load_or_are_refused(tmp_path):
    wrong = []
    found = fuzz_load.run(200, tmp_path, report=lambda *case: wrong.append(case))
    assert not wrong
    assert sum(found.values()) == 200
    assert found["refused"] > 100
    assert any(outcome.startswith("loaded") for outcome in found)
