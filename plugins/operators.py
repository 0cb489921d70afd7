"""The custom operators by name."""

import functools

from uhd_export.plugins.jbu.operator import JbuOperator
from uhd_export.plugins.operator import Operator
from uhd_export.plugins.window_attention.operator import WindowAttentionOperator


@functools.cache
def operators() -> dict[str, Operator]:
    """All operators by name."""
    return {operator.name: operator for operator in (JbuOperator(), WindowAttentionOperator())}
