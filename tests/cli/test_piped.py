"""What is printed into a pipe is laid out for programs, not for 80 columns."""


def test_piped_tables_are_as_wide_as_they_are(call, golden_bundle, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    lines = call("inspect", golden_bundle).stdout.splitlines()
    assert any(len(line) > 80 for line in lines), "wrapped at 80 columns"
    assert all(len(line) < 500 for line in lines), "padded to the console's width"
    monkeypatch.setenv("COLUMNS", "60")
    narrow = call("inspect", golden_bundle).stdout.splitlines()
    assert len(narrow) > len(lines)
