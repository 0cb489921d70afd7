"""Plugins are found by their entry point: the runtime names nobody above it."""

from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from uhd_export.runtime.engines.tensorrt import plugins
from uhd_export.runtime.errors import UhdError

ENGINE = Path("vision.engine")


class Fake:
    """Plugins that note what is asked of them."""

    def __init__(self, error=None):
        self.error, self.calls = error, []

    def register(self, trt):
        self.calls.append(trt)
        return ("Fake",)

    @contextmanager
    def errors(self):
        try:
            yield
        except RuntimeError as error:
            if self.error is not None:
                raise self.error from error
            raise


def test_our_own_plugins_are_found():
    (ours,) = plugins.find_plugins(ENGINE)
    assert callable(ours.register) and callable(ours.errors)
    assert ours.__name__ == "uhd_export.plugins.tensorrt.plugin"


def test_an_engine_whose_plugins_nobody_offers_is_refused(monkeypatch):
    def none(*, group):
        assert group == plugins.GROUP
        return ()

    monkeypatch.setattr(plugins, "entry_points", none)
    with pytest.raises(UhdError, match=r"^engine vision\.engine: .*build the bundle with --no-plugins$"):
        plugins.find_plugins(ENGINE)


def test_plugins_of_others_are_found_too(monkeypatch):
    entries = [EntryPoint(name, f"{name}.module", plugins.GROUP) for name in ("first", "second")]
    monkeypatch.setattr(EntryPoint, "load", lambda self: self.name)
    monkeypatch.setattr(plugins, "entry_points", lambda *, group: entries)
    assert plugins.find_plugins(ENGINE) == ["first", "second"]


def test_what_any_plugin_found_wrong_is_raised():
    first, second = Fake(), Fake(UhdError("operator: wrong"))
    with pytest.raises(UhdError, match=r"^operator: wrong$"), plugins.plugin_errors([first, second]):
        raise RuntimeError("what TensorRT makes of it")
    with pytest.raises(RuntimeError, match="makes of it"), plugins.plugin_errors([first]):
        raise RuntimeError("what TensorRT makes of it")
    with plugins.plugin_errors([]):
        pass
