"""The rows of the paper's tables: what each of them changes, and the paper's own figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from uhd_export.runtime.config import OFFICIAL, ModelConfig, official
from uhd_export.runtime.errors import UhdError

SIZE = (1008, 672)
STUDIES = ("table1", "table2", "table3", "table4", "table6")
CONVNEXT = "ConvNext"

_ACCURACY = "the paper's table holds accuracies alone, no cost: `average` is over its benchmarks"
_TRAINING = "the paper's period (hours) and memory (GB) are of fine-tuning on 8 x A100, not of inference"


@dataclass(frozen=True)
class Row:
    """One row: a model, how its images go through it, the paper's figures and what they measure.

    `encoder` other than "ViT" is counted but has no graph here. `graph` says why a row has none, if so.
    """

    name: str
    model: ModelConfig
    grid_mode: str = "selective"
    layout: str = "flat"
    encoder: str = "ViT"
    paper: Mapping[str, float] = field(default_factory=dict)
    paper_note: str = ""
    note: str = ""
    no_graph: str | None = None


def study_rows(study: str, model: str | ModelConfig = "Vicuna-7B") -> list[Row]:
    """The rows of `study`, one of STUDIES, for an official model or sizes of one's own. Raises UhdError."""
    if study not in STUDIES:
        raise UhdError(f"study {study!r}: must be one of {', '.join(STUDIES)}")
    if study == "table1":
        return _table1()
    base = official(model) if isinstance(model, str) else model
    return {"table2": _table2, "table3": _table3, "table4": _table4, "table6": _table6}[study](base)


def _with(model: ModelConfig, **changes: Any) -> ModelConfig:
    return replace(model, projector=replace(model.projector, **changes))


def _table1() -> list[Row]:
    note = (
        "the paper's count fits what hooks on Linear and Conv modules see at 1008x672: no product of two "
        "activations, nothing inside nn.MultiheadAttention, not the last `@ proj`; see `hooked`"
    )
    unknown = "Table 1 of the paper's first version has Vicuna-7B alone"
    return [
        Row(
            name,
            official(name),
            paper={"tflops": 17.5} if name == "Vicuna-7B" else {},
            paper_note=note if name == "Vicuna-7B" else unknown,
            no_graph="counted alone: a table of FLOPs",
        )
        for name in OFFICIAL
    ]


def _table2(base: ModelConfig) -> list[Row]:
    v1 = _with(base, kind="v1", levels=(1,))
    rows = (
        ("LLaVA-UHD (v1)", v1, "flat", 58.0, "the baseline's projector, one query set", None),
        (
            "+ JBU module",
            _with(base, kind="v1", levels=(4,)),
            "flat",
            60.0,
            "taken as the baseline's projector on the 4x map; the paper does not say which level it keeps",
            "no checkpoint has it and no graph is emitted for it",
        ),
        ("+ pyramid (HFP integration)", base, "flat", 61.5, "Hiwin over levels 0, 1, 2", None),
        ("+ token organization", base, "merged", 61.7, "the same graph; 19 positions more", None),
    )
    return [
        Row(
            name,
            model,
            layout=layout,
            paper={"average": average},
            paper_note=_ACCURACY,
            note=note,
            no_graph=why,
        )
        for name, model, layout, average, note, why in rows
    ]


def _table3(base: ModelConfig) -> list[Row]:
    conv = Row(
        CONVNEXT,
        base,
        encoder=CONVNEXT,
        paper={"average": 59.7},
        paper_note=_ACCURACY,
        note="CLIP-ConvNeXt-L instead of the ViT, maps of strides 32, 16, 8 as levels 0, 1, 2, as released "
        "otherwise; the paper does not name size or stages",
        no_graph="lives in the study alone",
    )
    kinds = (("DeConv.", "deconvolution", 61.7), ("Bilinear", "bilinear", 62.0), ("JBU module", "jbu", 63.0))
    notes = {
        "deconvolution": "a transposed convolution of stride 2 a stage; the paper does not give its layers",
        "bilinear": "each level resized from the first",
        "jbu": "",
    }
    return [conv] + [
        Row(
            name,
            _with(base, pyramid=pyramid),
            paper={"average": average},
            paper_note=_ACCURACY,
            note=notes[pyramid],
        )
        for name, pyramid, average in kinds
    ]


def _table4(base: ModelConfig) -> list[Row]:
    from uhd_export.runtime.profiling.paper import PAPER

    note = (
        "period (hours) and memory (GB) are of fine-tuning on 8 x A100; the latency is of inference on one "
        "A100, type, software and number of tokens not stated"
    )
    return [
        Row(
            mode,
            base,
            grid_mode=mode,
            paper={
                "period_hours": PAPER[mode][0],
                "latency_seconds": PAPER[mode][1],
                "memory_gb": PAPER[mode][2],
            },
            paper_note=note,
        )
        for mode in ("pyramid", "fix", "selective")
    ]


def _table6(base: ModelConfig) -> list[Row]:
    figures = (
        ("0,2", (1, 4), 27.7, 41.9, 63.4),
        ("0,1,2", (1, 2, 4), 28.0, 41.9, 63.7),
        ("0,1,2,3", (1, 2, 4, 8), 45.6, 53.0, 63.8),
    )
    return [
        Row(
            f"levels {name}",
            _with(base, levels=levels),
            paper={"period_hours": period, "memory_gb": memory, "average": average},
            paper_note=_TRAINING,
        )
        for name, levels, period, memory, average in figures
    ]
