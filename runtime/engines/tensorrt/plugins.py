"""What an engine needs of those who bring its custom operators, and where they are found.

The runtime names none of them: whoever has plugins says so under the entry point group `GROUP`, as the name
of a module (or object) that is a `Plugins`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Protocol

from uhd_export.runtime.errors import UhdError

GROUP = "uhd_export.tensorrt_plugins"


class Plugins(Protocol):
    """Custom operators for TensorRT."""

    def register(self, trt: ModuleType) -> Sequence[str]:
        """Register the plugins with TensorRT, once or again; returns the operators that they run."""
        ...

    def errors(self) -> AbstractContextManager[None]:
        """Raises what a plugin found wrong in the block, in place of what TensorRT makes of it."""
        ...


def find_plugins(engine: Path) -> list[Plugins]:
    """All plugins that are installed. Raises UhdError where there are none, which `engine` needs."""
    found: list[Plugins] = [entry.load() for entry in entry_points(group=GROUP)]
    if not found:
        raise UhdError(
            f"engine {engine}: calls custom operators, and nothing installed offers plugins for them "
            f"(entry points {GROUP}); install uhd-export again, or build the bundle with --no-plugins"
        )
    return found


@contextmanager
def plugin_errors(plugins: Sequence[Plugins]) -> Iterator[None]:
    """The block within `errors` of all `plugins`; of an engine without, there are none."""
    with ExitStack() as stack:
        for each in plugins:
            stack.enter_context(each.errors())
        yield
