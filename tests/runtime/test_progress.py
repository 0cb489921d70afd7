"""Bars: they end full, say bytes in their unit, and one command has one overall bar."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from uhd_export.runtime import progress
from uhd_export.runtime.progress import expect, overall_bar, progress_bar, seconds_left


@pytest.fixture
def clock():
    """A clock that stands still at `now`, in seconds, until it is set."""
    return SimpleNamespace(now=0.0)


@pytest.fixture
def screen(monkeypatch, clock):
    """What a terminal of 120 columns was sent."""
    out = io.StringIO()
    monkeypatch.setattr(
        progress,
        "Console",
        lambda stderr: Console(
            file=out, force_terminal=True, width=120, color_system=None, get_time=lambda: clock.now
        ),
    )
    return out


def last_line(screen):
    """The last line that was drawn; escape codes that hide and show the cursor follow it."""
    return [line for line in screen.getvalue().splitlines() if "/" in line][-1]


def test_a_bar_ends_full(screen):
    with progress_bar("steps") as bar:
        bar.set(50, 51)
    assert "51/51" in last_line(screen)


def test_a_bar_that_failed_does_not(screen):
    with pytest.raises(ValueError), progress_bar("steps") as bar:
        bar.set(50, 51)
        raise ValueError
    assert "51/51" not in screen.getvalue() and "50/51" in screen.getvalue()


def test_bytes_are_said_in_their_unit(screen):
    with progress_bar("hashing", 200_000_000, nbytes=True) as bar:
        bar.advance(50_000_000)
    assert "200.00 MB of 200.00 MB" in screen.getvalue()


@pytest.mark.parametrize(
    ("at", "elapsed", "done", "total", "left"),
    [
        (10.0, 10.0, 25, 100, 30.0),
        (90.0, 90.0, 90, 100, 10.0),
        (90.0, 94.0, 90, 100, 6.0),
        (90.0, 101.0, 90, 100, None),
        (1.0, 3.0, 50, 100, None),
        (10.0, 10.0, 1, 100, None),
        (10.0, 10.0, 5, None, None),
        (10.0, 10.0, 100, 100, None),
    ],
)
def test_time_left_is_of_the_mean_pace_or_not_said(at, elapsed, done, total, left):
    """It counts down between two steps, and says nothing once it is over."""
    assert seconds_left(at, elapsed, done, total) == left


def test_a_bar_tells_the_time_left_of_its_own_steps(screen, clock):
    with progress_bar("steps", 4) as bar:
        for seconds in (3, 6):
            clock.now = seconds
            bar.advance()
            bar._progress.refresh()
        clock.now = 8
        bar._progress.refresh()
    assert "about 6 s left" in screen.getvalue() and "about 4 s left" in screen.getvalue()


def test_the_whole_tells_the_time_left_by_what_its_stages_were_expected_to_take(screen, clock):
    """Half as fast as was expected: 10 seconds of 100 took 20, so the rest takes 180."""
    with overall_bar("build"):
        expect({"vision": 20, "language": 80})
        with progress_bar("vision") as bar:
            clock.now = 20
            bar.set(5, 10)
            bar._progress.refresh()
            lines = [line for line in screen.getvalue().splitlines() if "about 180 s left" in line]
            assert lines and all("build: vision" in line and "0/2" in line for line in lines)
            clock.now = 40
        with progress_bar("language") as bar:
            clock.now = 120
            bar.set(1, 2)
            bar._progress.refresh()
            line = [line for line in screen.getvalue().splitlines() if "build: language" in line][-1]
            assert "about 80 s left" in line and "1/2" in line


def test_stages_are_one_bar(screen):
    with overall_bar("build"):
        expect({"vision": 1, "language": 1})
        for name in ("vision", "language"):
            with progress_bar(name) as bar:
                bar.set(3, 9)
            with overall_bar("quantize"):
                pass  # a command within a command has no bar of its own
    text = screen.getvalue()
    assert "build: vision" in text and "build: language" in text and "quantize" not in text
    last = last_line(screen)
    assert "2/2" in last and "language" not in last, "a stage's bar stays behind"
    assert progress._Overall.current is None


def test_stages_that_nobody_foresaw_and_those_that_did_not_come(screen):
    for expected, ran in ((0, 2), (1, 3), (5, 2)):
        with overall_bar("build"):
            expect({f"stage {i}": 3.0 for i in range(expected)})
            for i in range(ran):
                with progress_bar(f"stage {i}", 1) as bar:
                    bar.advance()
                    task = progress._Overall.current.progress.tasks[0]
                    assert task.fields["stages"] == (i, max(i + 1, expected))
        assert f"{ran}/{ran}" in last_line(screen)


def test_without_a_whole_nothing_is_expected(screen):
    expect({"vision": 1})
    with progress_bar("vision", 1):
        pass
    assert "1/1" in last_line(screen)


def test_nothing_is_drawn_where_nobody_looks(capsys):
    with overall_bar("build"), progress_bar("stage", 1) as bar:
        bar.advance()
    assert capsys.readouterr() == ("", "")


def test_after_an_error_the_next_command_has_its_own_bar(screen):
    with pytest.raises(KeyboardInterrupt), overall_bar("build"), progress_bar("stage"):
        raise KeyboardInterrupt
    with progress_bar("alone", 1):
        pass
    assert "alone" in screen.getvalue() and "build: alone" not in screen.getvalue()
