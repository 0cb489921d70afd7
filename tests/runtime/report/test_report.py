import csv
import io
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest

from uhd_export.runtime.bundle.manifest import Parity
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.profiling.compare import compare
from uhd_export.runtime.profiling.facts import describe_profile, read_profile
from uhd_export.runtime.profiling.profiler import ProfileOptions, profile_pipeline
from uhd_export.runtime.report import charts
from uhd_export.runtime.report.page import profile_page
from uhd_export.runtime.report.table import profile_csv


@pytest.fixture(scope="module")
def facts(pipeline):
    """One quick profile; what takes long is filled in by hand."""
    with pytest.MonkeyPatch.context() as patch:
        for name, size in (("SWEEP", ((200, 200), (400, 300))), ("fits_apart", lambda device: True)):
            patch.setattr(f"uhd_export.runtime.profiling.profiler.{name}", size)
        options = ProfileOptions((200, 200), ("selective", "fix"), repeats=3, tokens=2, threads=1, sweep=True)
        profile = profile_pipeline(pipeline, options)
    return json.loads(json.dumps(describe_profile(profile)))


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for n, v in attributes if n in ("src", "href", "xlink:href", "data", "action")]

    def handle_data(self, data):
        self.text += data + " "


def test_the_page_needs_nothing_else(facts):
    html = profile_page(facts)
    page = Page(html)
    assert page.links == [] and not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import", html)
    hosts = set(re.findall(r"https?://([\w.]+)", html))
    assert hosts <= {"www.w3.org"}, "the namespaces of SVG alone"
    assert "default-src 'none'" in html and "prefers-color-scheme: dark" in html


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(browser, facts, tmp_path, width, scheme):
    path = tmp_path / "profile.html"
    inputs = "pattern 500x336, overview 406x266, selective"
    parity = asdict(Parity("vision (graph)", inputs, "relative error", 8.5e-7, 1e-3, None))
    facts = {**facts, "evidence": {**facts["evidence"], "parity": [parity]}}
    path.write_text(profile_page(facts), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems, fetched = [], []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(path.as_uri())
    boxes = page.evaluate("() => [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect())")
    assert len(boxes) == 7 and all(box["width"] > 200 and box["height"] > 50 for box in boxes)
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    if width > 1000:  # on a small screen tables may be scrolled
        cut = "() => [...document.querySelectorAll('section')].filter(s => s.scrollWidth > s.clientWidth)"
        assert page.evaluate(f"({cut})().map(s => s.innerText)") == [], "cells lie outside their box"
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert (red + green + blue > 384) == (scheme == "light")
    assert not problems and fetched == [path.as_uri()]
    if "UHD_SCREENSHOTS" in os.environ:
        page.screenshot(path=f"{os.environ['UHD_SCREENSHOTS']}/profile-{width}.png", full_page=True)


def test_the_page_shows_every_figure(facts):
    page = Page(profile_page(facts))
    assert page.tags.count("svg") == 7, "a chart is missing"
    for words in ("selective", "Hiwin", "paper's latency", "GFLOP/s", "resident memory", "visual tokens"):
        assert words in page.text
    assert "A100" in page.text and "fine-tuning" in page.text
    for version in facts["versions"].values():
        assert version in page.text
    assert "built without measuring" in page.text
    assert facts["machine"]["processor"] in page.text


def test_what_was_not_measured_is_said(facts):
    modes = [{**mode, "cold": None, "peak_bytes": None} for mode in facts["modes"]]
    bare = {**facts, "rates": None, "sweep": [], "modes": modes, "others": 0.5, "warnings": ["was busy <b>"]}
    page = Page(profile_page(bare))
    assert page.tags.count("svg") == 3 and page.text.count("Not measured here") == 4
    assert "was busy <b>" in page.text, "escaped"


def test_charts_take_their_colours_from_the_page(facts):
    style = profile_page(facts).split("<style>")[1].split("</style>")[0]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    for drawn in (charts.stage_bars(facts), charts.roofline(facts), charts.memory(facts)):
        svg = charts.draw(drawn)
        ElementTree.fromstring(svg)
        used = set(re.findall(r"var\((--\w+)\)", svg))
        assert {"--ink", "--faint"} <= used and len(used) > 4
        for name in used:
            assert f"{name}:" in light and f"{name}:" in dark
        colours = set(re.findall(r'(?:fill|stroke)="(#\w+)"', svg))
        assert not colours, f"{colours} are the same in dark and light"


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    with pytest.raises(UhdError, match=r"pip install 'uhd-export\[report\]'"):
        charts.draw({})


def test_the_sweep_is_of_growing_images(facts):
    first, second = facts["sweep"]
    assert (first["size"], second["size"]) == ([200, 200], [400, 300])
    assert first["visual_tokens"] == 144 < second["visual_tokens"]
    assert first["peak_bytes"] <= second["peak_bytes"]
    assert 0 < first["seconds"]["vision"] < second["seconds"]["vision"]


def test_the_cold_start_has_memory_over_time(facts):
    cold = facts["modes"][0]["cold"]
    assert 0 < cold["open_seconds"] < cold["first_token_seconds"]
    names = [span["name"] for span in cold["spans"]]
    assert names == ["open", "pixels", "vision", "prefill", "decode"]
    seconds = [point[0] for point in cold["memory"]]
    assert seconds == sorted(seconds) and len(seconds) > 3
    # The system counts pages in batches: the peak may lag by a few.
    assert max(size for _, size in cold["memory"]) <= cold["peak_bytes"] * 1.02


def test_rows_for_spreadsheets(facts):
    rows = list(csv.DictReader(io.StringIO(profile_csv(facts))))
    stages = [row["stage"] for row in rows if row["grid_mode"] == "fix"]
    assert stages == [*facts["modes"][1]["stages"], "first_token", "cold_open", "cold_first_token"]
    vision = next(row for row in rows if row["stage"] == "vision")
    assert float(vision["seconds_median"]) == facts["modes"][0]["stages"]["vision"]["seconds"]["median"]
    assert int(vision["flops"]) > 0 and vision["runs"] == "3" and vision["paper_latency_seconds"] == "0.54"


def written(path, facts, scale=1.0):
    changed = json.loads(json.dumps(facts))
    for mode in changed["modes"]:
        for spread in (mode["first_token"], *(stage["seconds"] for stage in mode["stages"].values())):
            spread["samples"] = [sample * scale for sample in spread["samples"]]
    path.write_text(json.dumps(changed))
    return path


def test_two_files_are_compared(facts, tmp_path):
    a, b = written(tmp_path / "a.json", facts), written(tmp_path / "b.json", facts, 0.25)
    compared = compare(a, b, ProfileOptions((200, 200)))
    assert not compared.paired and {r.grid_mode for r in compared.ratios} == {"selective", "fix"}
    for ratio in compared.ratios:
        assert ratio.ratio == pytest.approx(0.25)
        assert ratio.interval[0] <= ratio.ratio <= ratio.interval[1]
    same = compare(a, a, ProfileOptions((200, 200)))
    assert not any(ratio.certain for ratio in same.ratios)


def test_files_that_do_not_compare(facts, tmp_path, golden_bundle):
    a = written(tmp_path / "a.json", facts)
    other = written(tmp_path / "b.json", {**facts, "size": [100, 100]})
    with pytest.raises(UhdError, match="size"):
        compare(a, other, ProfileOptions((200, 200)))
    with pytest.raises(UhdError, match="two of a kind"):
        compare(a, golden_bundle, ProfileOptions((200, 200)))
    (tmp_path / "c.json").write_text("{}")
    with pytest.raises(UhdError, match="is not what `uhd-export profile --json` writes"):
        read_profile(tmp_path / "c.json")


def test_two_bundles_run_in_turns(golden_bundle, monkeypatch):
    ran = []
    real = __import__("uhd_export.runtime.profiling.compare", fromlist=["run_once"]).run_once
    monkeypatch.setattr(
        "uhd_export.runtime.profiling.compare.run_once",
        lambda pipeline, *rest: ran.append(id(pipeline)) or real(pipeline, *rest),
    )
    options = ProfileOptions((200, 200), ("fix",), repeats=4, tokens=1, device="cpu", threads=1)
    compared = compare(golden_bundle, golden_bundle, options)
    assert compared.paired and all(0.1 < ratio.ratio < 10 for ratio in compared.ratios)
    a, b = ran[-8], ran[-7]
    assert ran[-8:] == [a, b, b, a, a, b, b, a], "drift would not cancel"


def test_the_commands_files(call, fails, golden_bundle, facts, tmp_path, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    saved = written(tmp_path / "p.json", facts)
    done = call("profile", saved, "--html", tmp_path / "r.html", "--csv", tmp_path / "r.csv")
    assert done.exit_code == 0, done.output
    assert "<svg" in (tmp_path / "r.html").read_text() and "fix" in (tmp_path / "r.csv").read_text()
    assert "no folder" in fails("profile", golden_bundle, "--csv", tmp_path / "x" / "r.csv")
    assert "needs a bundle" in fails("profile", saved, "--trace", tmp_path / "t.json")
    assert "give a bundle" in fails("profile")
    assert "leave it out" in fails("profile", "--compare", saved, saved, "--csv", tmp_path / "c.csv")
    text = call("profile", "--compare", saved, saved).stdout
    assert "no difference shown" in text
    assert json.loads(call("profile", "--compare", saved, saved, "--json").stdout)["paired"] is False


def test_files_that_cannot_be_written_are_refused_at_once(fails, facts, tmp_path, monkeypatch):
    saved = written(tmp_path / "p.json", facts)
    for name in ("--csv", "--trace", "--html"):
        assert f"{name} {tmp_path}: is no plain file" in fails("profile", saved, name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "--csv .: is no plain file" in fails("profile", saved, "--csv", ".")
    same = ("--html", tmp_path / "r", "--csv", tmp_path / "sub" / ".." / "r")
    (tmp_path / "sub").mkdir()
    assert "is --html too" in fails("profile", saved, *same)
    assert "is what is read too" in fails("profile", saved, "--csv", "p.json")
    assert read_profile(saved) == facts
    for length in (250, 300):  # with the temporary file's suffix, and alone
        assert "name too long" in fails("profile", saved, "--csv", "x" * length)
    monkeypatch.setattr("os.access", lambda path, mode: mode != os.W_OK)
    assert f"{tmp_path} cannot be written" in fails("profile", saved, "--csv", tmp_path / "r.csv")


@pytest.mark.parametrize(
    "given",
    [
        ("--size", "300x300"),
        ("--repeats", "9"),
        ("--tokens", "3"),
        ("--grid", "fix"),
        ("--threads", "1"),
        ("--device", "cpu"),
        ("--context", "99"),
        ("--prefill-chunk", "9"),
    ],
)
def test_options_that_would_do_nothing_are_refused(fails, facts, tmp_path, given):
    saved = written(tmp_path / "p.json", facts)
    assert f"{given[0]}: needs a bundle" in fails("profile", saved, "--csv", tmp_path / "r.csv", *given)
    assert f"{given[0]}: is of bundles" in fails("profile", "--compare", saved, saved, *given)
    refused = fails("profile", "--study", "table1", "--count", *given)
    assert f"{given[0]}: is of" in refused and "leave it out" in refused


def test_a_trace_that_fails_costs_no_figures(call, golden_bundle, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("uhd_export.runtime.profiling.trace.write_trace", fail)
    short = ("--size", "100x100", "--repeats", 1, "--tokens", 1, "--grid", "fix", "--json")
    done = call("profile", golden_bundle, *short, "--trace", tmp_path / "t.json")
    assert done.exit_code == 2 and "not enough memory" in done.stderr, done.output
    assert json.loads(done.stdout)["repeats"] == 1


@pytest.mark.parametrize("lost", ["modes", "size", "machine"])
def test_a_profile_that_is_not_whole_is_told(fails, facts, tmp_path, lost):
    saved = written(tmp_path / "p.json", facts)
    cut = tmp_path / "cut.json"
    cut.write_text(json.dumps({name: value for name, value in facts.items() if name != lost}))
    for output in ("--html", "--csv"):
        assert "cut.json: not a whole profile" in fails("profile", cut, output, tmp_path / "r")
    if lost != "machine":  # which a comparison does not look at
        assert "cut.json: not a whole profile" in fails("profile", "--compare", saved, cut)
    none, empty = json.loads(saved.read_text()), tmp_path / "empty.json"
    none["modes"][0]["first_token"]["samples"] = []
    empty.write_text(json.dumps(none))
    assert "not a whole profile" in fails("profile", "--compare", saved, empty)
    assert not (tmp_path / "r").exists()


def test_a_profiles_file_alone_makes_nothing(fails, facts, tmp_path):
    saved = written(tmp_path / "p.json", facts)
    assert "give --html or --csv" in fails("profile", saved)
    assert "--json: needs a bundle" in fails("profile", saved, "--json")


def test_a_busy_machine_is_told(pipeline):
    from uhd_export.runtime.profiling.facts import warnings

    options = ProfileOptions((200, 200), ("fix",), repeats=1, tokens=1, threads=1)
    profile = profile_pipeline(pipeline, options)
    assert any("busy" in line for line in warnings(replace(profile, others=0.4)))
    assert not any("busy" in line for line in warnings(replace(profile, others=0.02)))
