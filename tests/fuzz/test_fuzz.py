"""Hundreds of damaged inputs, the same in every run: each is taken or refused in one line."""

import pytest

from fuzz import campaign
from fuzz.campaign import DEFECTS, run
from fuzz.targets import KINDS

SEED = 2026


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    from uhd_export import build_bundle

    folder = tmp_path_factory.mktemp("fuzz") / "nano"
    build_bundle("nano", folder, verify=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_input_is_a_defect(kind, nano):
    result = run(kind, SEED, KINDS[kind][1], nano)
    print(result)
    assert not result.defects, f"{result}\n{result.defects}"
    assert sum(result.counts.values()) == KINDS[kind][1]
    assert result.counts["refused"] > KINDS[kind][1] // 10


def test_defects_are_counted(nano, monkeypatch, tmp_path):
    """The harness sees what it is for: a traceback, a crash, a hang, and goes on behind each."""
    worker = tmp_path / "fuzz"
    worker.mkdir()
    (worker / "__init__.py").touch()
    (worker / "worker.py").write_text(
        "import os, sys, time\n"
        "for n in range(int(sys.argv[3]), int(sys.argv[4])):\n"
        "    print(n, 'begun', flush=True)\n"
        "    if n == 1: os.kill(os.getpid(), 11)\n"
        "    if n == 2: time.sleep(60)\n"
        "    print(n, 'traceback' if n == 0 else 'taken', '\"x\"', flush=True)\n"
    )
    monkeypatch.setattr(campaign, "__file__", str(worker / "campaign.py"))
    monkeypatch.setattr(campaign, "_FIRST", 3)
    result = run("images", 1, 5, nano)
    assert dict(result.counts) == {"traceback": 1, "signal": 1, "hang": 1, "taken": 2}
    assert sorted(result.defects) == [0, 1, 2] and set(DEFECTS) < set(result.counts)
