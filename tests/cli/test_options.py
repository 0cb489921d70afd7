"""Options: how help groups them, how the shell completes them, and what they reach a command as."""

import subprocess
import sys

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from uhd_export.calibration.options import CalibrationOptions
from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.cli.command import Command, concern, option
from uhd_export.cli.main import main
from uhd_export.cli.opening import PipelineOptions
from uhd_export.cli.options import _Template, image_options, source_options
from uhd_export.runtime.choices import GRID_MODES, TEMPLATES


def sections(help_text):
    """The options of each section of a help page, by its title."""
    found, title = {}, None
    for line in help_text.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            title = line[:-1]
        elif line.startswith("  -"):
            found.setdefault(title, set()).update(word for word in line.split() if word.startswith("--"))
    return found


def test_the_long_help_is_grouped():
    groups = sections(CliRunner().invoke(main, ["build", "--help"]).stdout)
    assert list(groups) == [
        *("Output", "Source", "Images", "Weights", "Calibration", "Engines", "Options"),
    ]
    reading = {"--revision", "--config", "--vision-tower", "--layout", "--mask", "--template"}
    assert groups["Source"] == reading
    assert groups["Images"] == {"--grid", "--max-slices", "--resize", "--boxes"}
    assert groups["Options"] == {"--debug", "--help"}
    assert "Calibration" in sections(CliRunner().invoke(main, ["quantize", "--help"]).stdout)


@pytest.mark.parametrize("name", main.commands)
def test_every_command_takes_debug_and_has_help(name):
    done = CliRunner().invoke(main, [name, "--debug", "--help"])
    assert done.exit_code == 0 and "--debug" in done.stdout and "0x" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "begun", "values"),
    [
        (["build", "--grid"], "", GRID_MODES),
        (["build", "--weights"], "int4", ("int4", "int4-rtn")),
        (["build", "--backend"], "tensorrt", ("tensorrt-rtx", "tensorrt")),
        (["build", "--group-size"], "", ("32", "64", "128")),
        (["run", "--device"], "", ("cpu", "cuda")),
        ([], "pro", ("profile",)),
    ],
)
def test_the_shell_completes_choices(arguments, begun, values):
    completer = ShellComplete(main, {}, "uhd-export", "_UHD_EXPORT_COMPLETE")
    assert tuple(item.value for item in completer.get_completions(arguments, begun)) == values


def test_completion_through_the_real_entry_point():
    environment = {
        "COMP_WORDS": "uhd-export build --boxes ",
        "COMP_CWORD": "3",
        "_UHD_EXPORT_COMPLETE": "bash_complete",
    }
    command = [sys.executable, "-m", "uhd_export"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["plain,exact", "plain,bf16"]


def invoked(command, *arguments):
    """What the one function under `command` was called with."""
    seen = {}
    wrapped = click.command(cls=Command)(command(lambda **values: seen.update(values)))
    done = CliRunner().invoke(wrapped, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return seen


def test_values_arrive_as_the_dataclass_of_their_concern():
    given = ["--grid", "fix", "--max-slices", 3, "--resize", 500, "--boxes", "bf16"]
    assert invoked(image_options, *given) == {"images": ImageOptions("fix", 3, 500, "bf16")}
    given = ["--config", "c.json", "--vision-tower", "clip", "--layout", "merged", "--mask", 15]
    expected = SourceOptions("c.json", "clip", "merged", 15, revision="v1")
    assert invoked(source_options, *given, "--revision", "v1") == {"reading": expected}
    assert invoked(image_options) == {"images": ImageOptions()}
    assert invoked(source_options) == {"reading": SourceOptions()}


def test_a_concern_may_hold_others_and_leaves_the_rest_alone():
    def whole(images, samples):
        return images, samples

    def decorate(function):
        outer = image_options(concern("both", whole, option("--samples", type=int))(function))
        return option("--other", type=int)(outer)

    assert invoked(decorate, "--samples", 5, "--other", 7) == {"both": (ImageOptions(), 5), "other": 7}


def test_a_bundle_is_opened_with_what_is_given(monkeypatch, tmp_path):
    calls = []
    opened = type("P", (), {"open": lambda *a, **k: calls.append((a, k))})
    monkeypatch.setattr("uhd_export.runtime.pipeline.Pipeline", opened)
    monkeypatch.setattr(PipelineOptions, "warn", lambda self, bundle: calls.append(bundle))
    PipelineOptions(threads=2, resize=300).open(tmp_path)
    assert calls.pop(0) == tmp_path  # before anything is loaded
    assert calls == [((tmp_path,), {"threads": 2, "resize": 300})]


def test_defaults_of_the_command_line_are_those_of_the_dataclasses():
    for name in ("build", "quantize"):
        defaults = {parameter.name: parameter.default for parameter in main.commands[name].params}
        for kind in (ImageOptions, CalibrationOptions):
            for field, value in vars(kind()).items():
                if field in defaults and value is not None:
                    assert defaults[field] == value, (name, field)


def test_templates_are_known_by_the_released_scripts_names():
    template = _Template(TEMPLATES)
    names = {"v1": "vicuna_v1", "vicuna_v1": "vicuna_v1", "qwen_1_5": "qwen", "llava_v1": "llava_v1"}
    assert {name: template.convert(name, None, None) for name in names} == names
    for other in ("v0", "llama_2", "mpt"):
        with pytest.raises(click.BadParameter, match=f"'{other}' is not one of"):
            template.convert(other, None, None)
