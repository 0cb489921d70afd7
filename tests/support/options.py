"""Options as tests like to write them: flat keywords, sorted into the dataclass of each concern."""

from dataclasses import fields
from typing import Any

from uhd_export.bundle.options import BuildOptions
from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.graph.int4.options import WeightOptions


def build_options(**flat: Any) -> BuildOptions:
    """`BuildOptions` with each of `flat` in the dataclass that has a field of its name."""
    whole = {}
    for name, kind in (("reading", SourceOptions), ("images", ImageOptions), ("weights", WeightOptions)):
        names = {field.name for field in fields(kind)} & flat.keys()
        whole[name] = kind(**{key: flat[key] for key in names})
        flat = {key: value for key, value in flat.items() if key not in names}
    return BuildOptions(**whole, **flat)
