import math
from collections import Counter

import pytest
import torch
from golden import recipe
from hypothesis import given
from hypothesis import strategies as st
from support.goldens import golden_json
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from uhd_export.model.folding import fold, folded_tokens
from uhd_export.model.language import LanguageModel
from uhd_export.model.projector import HiwinProjector
from uhd_export.model.vit import VisionTower
from uhd_export.runtime.config import OFFICIAL, LanguageConfig, ProjectorConfig, VisionConfig, official
from uhd_export.runtime.image.geometry import bin_grid, crop_geometry
from uhd_export.runtime.image.slicing import plan_slices
from uhd_export.runtime.profiling import costs as flops
from uhd_export.runtime.profiling.costs import kv_cache_bytes, language_bytes, stage_costs, total

aten = torch.ops.aten
GRIDS = plan_slices((1008, 672)).patch_grids
MASKS = {"mask7(1x,2x,4x)": (1, 2, 4), "mask5(1x,4x)": (1, 4), "mask3(1x,2x)": (1, 2)}
PROJECTOR_NAMES = {
    "level_linear": "level_linear",
    "pooling": "roialign_k_and_v",
    "query": "q_in_proj",
    "key": "k_in_proj",
    "value": "v_in_proj",
    "attention": "scores_av",
    "out": "out_proj",
    "cat": "cat_proj",
    "proj": "final_proj",
}


def released(levels, model="Vicuna-7B", positions=1066):
    costs = stage_costs(GRIDS, official(model, levels), positions, folded=False)
    return {stage: {name: work.flops for name, work in parts.items()} for stage, parts in costs.items()}


def test_vision_tower_as_released():
    golden, counted = golden_json("flops")["vit_L14_336"], released((1, 2, 4))["vit"]
    assert counted == {
        "patches": golden["patch_embed"],
        "projections": golden["attn_proj(qkvo)"],
        "attention": golden["attn_scores+av"],
        "mlp": golden["mlp"],
    }
    assert sum(counted.values()) == golden["total"]
    layers = sum(counted.values()) - counted["patches"]
    assert layers // 24 == golden["last_layer_unused"]


@pytest.mark.parametrize("mask", MASKS)
def test_pyramid_as_released(mask):
    golden, counted = golden_json("flops")[mask]["jbu"], released(MASKS[mask])["jbu"]
    assert counted == {
        "range": golden["range_proj"],
        "similarity": golden["range_similarity"],
        "kernel_fixup": golden["fixup_kernel"],
        "bicubic": golden["bicubic_upsample_16tap"],
        "weighted_sum": golden["adaptive_conv_49tap"],
        "fixup": golden["final_fixup_1x1"],
    }
    assert sum(counted.values()) == golden["total"]


@pytest.mark.parametrize(
    "entry, part, model, levels",
    [(mask, "projector_E4096", "Vicuna-7B", levels) for mask, levels in MASKS.items()]
    + [
        ("mask5 Qwen2-7B E3584", "projector", "Qwen2-7B", (1, 4)),
        ("mask5 Vicuna-13B E5120", "projector", "Vicuna-13B", (1, 4)),
    ],
)
def test_projector_as_released(entry, part, model, levels):
    golden = golden_json("flops")[entry][part]
    counted = released(levels, model)["projector"]
    assert counted == {name: golden[theirs] for name, theirs in PROJECTOR_NAMES.items()}
    assert sum(counted.values()) == golden["total"]
    shape = official(model, levels).projector
    assert [flops.keys_per_window(grid, shape) for grid in GRIDS] == golden["keys_per_window"]


@pytest.mark.parametrize("positions, suffix", [(1066, "T1066"), (1085, "T1085_permute")])
def test_prefill_as_released(positions, suffix):
    golden = golden_json("flops")[f"llm_prefill_vicuna7b_{suffix}"]
    counted = released((1, 2, 4), positions=positions)["prefill"]
    assert counted.pop("head") == golden["lm_head_all_pos"]
    assert sum(counted.values()) == golden["layers"]


def counted_by_torch(run, *arguments) -> int:
    # The fused attention of the CPU is not counted: use the one made of products.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, torch.inference_mode(), FlopCounterMode(display=False) as counter:
        run(*arguments)
    return counter.get_total_flops()


def filled(module, prefix):
    for name, parameter in module.named_parameters():
        value = recipe.weight(prefix + name, tuple(parameter.shape)).reshape(parameter.shape)
        parameter.data.copy_(torch.from_numpy(value))
    return module.requires_grad_(False)


class Products(TorchDispatchMode):
    """Counts the matrix products that run, by (batch, rows, inner, columns) or (rows, inner, columns)."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function in (aten.mm.default, aten.addmm.default, aten.bmm.default):
            left, right = arguments[-2:]
            self.seen[*left.shape, right.shape[-1]] += 1
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("grid", [(24, 24), (9, 31)])
@pytest.mark.parametrize("levels", [(1,), (1, 2), (1, 4), (1, 2, 4)])
def test_every_part_of_the_folded_projector_is_what_torch_executes(grid, levels):
    c, d, n, heads, sets, windows = 64, 256, 3, 2, 4, 144
    config = ProjectorConfig("hiwin", d, c, levels, 12)
    folded = fold(filled(HiwinProjector(config), "model.mm_projector."))
    geometry = {k: torch.from_numpy(v) for k, v in crop_geometry(*grid, levels=(1, 2, 4)).items()}
    maps = {s: torch.randn(n, s * grid[0], s * grid[1], c) for s in levels}
    with torch.no_grad(), Products() as products:
        folded_tokens(folded, maps, geometry)
    expected = {
        "norm": [], "pooling": [], "position": [], "scores": [], "mixing": [],
        "value": [(heads, windows * n * sets, c, 128)] * len(levels),
        "out": [(windows * n * sets, d, d)],
        "cat": [(windows * n, sets * d, d)],
        "proj": [(windows * n, d, d)],
    }  # fmt: skip
    keys = sum(math.prod(bin_grid(*grid, scale, "selective")) for scale in levels)
    expected["position"] += [(windows, keys, windows, heads * sets)]
    for scale in levels:
        (rows, cols), (y, x) = (scale * side for side in grid), bin_grid(*grid, scale, "selective")
        queries = heads * sets
        expected["norm"] += [(n * rows * cols, c, c)]
        expected["pooling"] += [(1, 12 * y, rows, cols * n * c), (1, 12 * y * n * c, cols, 12 * x)]
        expected["scores"] += [(windows, n * y * x, c, queries)]
        expected["mixing"] += [(windows * n, queries, y * x, c)]
    parts = flops.projector([grid] * n, config, folded=True)
    assert {name: part.flops for name, part in parts.items()} == {
        name: sum(2 * math.prod(shape) for shape in shapes) for name, shapes in expected.items()
    }
    ours = Counter(shape for shapes in expected.values() for shape in shapes)
    assert not ours - products.seen
    # What is left: pooling and mixing the scale and the mass of each row, two more channels beside C.
    left = sum(2 * math.prod(shape) * count for shape, count in (products.seen - ours).items())
    assert left < 0.05 * total(parts).flops


def test_exported_vision_tower_equals_what_torch_executes():
    config = VisionConfig(64, 128, 3, 4, 336, 14, 1e-5)
    tower = filled(VisionTower(config), "model.vision_tower.vision_tower.vision_model.")
    geometry = {k: torch.from_numpy(v) for k, v in crop_geometry(19, 29).items()}
    executed = counted_by_torch(tower, torch.randn(2, 3, 14 * 19, 14 * 29), geometry)
    table = counted_by_torch(tower.embeddings, torch.randn(2, 3, 14 * 19, 14 * 29), geometry)
    parts = flops.vit([(19, 29)] * 2, VisionConfig(64, 128, 3, 4, 336, 14, 1e-5), folded=True)
    interpolation = table - parts["patches"].flops
    assert 0 < interpolation < 0.1 * executed
    assert total(parts).flops == executed - interpolation


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_decoder_equals_what_torch_executes(kv_heads):
    fields = ("llama", 128, 256, 2, 4, kv_heads, 32, 100, 64, 1e-5, 1e4, False, 1, (2,))
    model, shape = LanguageModel(LanguageConfig(*fields)), LanguageConfig(*fields)
    for parameter in model.parameters():
        parameter.data.normal_()
    embeds, cache = torch.randn(1, 17, 128), model.new_cache()
    whole = counted_by_torch(model, embeds)
    counted_by_torch(model, embeds, cache)
    step = counted_by_torch(model, embeds[:, :1], cache)
    assert whole == total(flops.prefill(shape, 17, folded=False)).flops
    assert step == total(flops.decode(shape, 17)).flops


def test_weights_equal_the_modules_parameters():
    """All but biases, norms, positions and queries, which are no matrix products."""

    def matrices(module):
        return sum(p.numel() for p in module.parameters() if p.dim() > 1)

    vision = VisionConfig(64, 128, 3, 4, 336, 14, 1e-5)
    tables = 64 * (24 * 24 + 1)
    counted = total(flops.vit([(24, 24)], VisionConfig(64, 128, 3, 4, 336, 14, 1e-5), folded=True)).weights
    assert counted == matrices(VisionTower(vision)) - tables
    fields = ("llama", 128, 256, 2, 4, 2, 32, 100, 64, 1e-5, 1e4, False, 1, (2,))
    assert language_bytes(LanguageConfig(*fields), 1, 1) == matrices(LanguageModel(LanguageConfig(*fields)))
    tied = (*fields[:11], True, *fields[12:])
    assert language_bytes(LanguageConfig(*tied), 1, 1) == matrices(LanguageModel(LanguageConfig(*tied)))
    module = HiwinProjector(ProjectorConfig("hiwin", 256, 64, (1, 2, 4), 12))
    shape = ProjectorConfig("hiwin", 256, 64, (1, 2, 4), 12)
    counted = total(flops.projector([(24, 24)], shape, folded=False)).weights
    counted += total(flops.jbu([(24, 24)], shape, folded=False)).weights
    tables = 5 * 144 * 256 + 3 * 256  # positions, four query sets, level embeddings
    assert counted == matrices(module) - tables


@pytest.mark.parametrize("levels", [(1,), (1, 2, 4)])
def test_weights_of_each_folded_part_equal_the_folded_tensors(levels):
    config = ProjectorConfig("hiwin", 256, 64, levels, 12)
    folded = fold(filled(HiwinProjector(config), "model.mm_projector."))
    parts = flops.projector([(24, 24)], config, folded=True)
    counted = {name: parts[name].weights for name in ("norm", "scores", "value", "out", "cat", "proj")}
    assert counted == {
        "norm": sum(level.norm_weight.numel() for level in folded.levels),
        "scores": sum(level.query.numel() for level in folded.levels),
        "value": folded.value.numel(),
        "out": folded.out_weight.numel(),
        "cat": folded.cat_weight.numel(),
        "proj": folded.proj_weight.numel(),
    }


def test_folding_saves_what_the_documentation_says():
    model = official("Vicuna-7B")
    one = {
        folded: total(stage_costs([(24, 24)], model, 1, folded=folded)["projector"]).flops
        for folded in (False, True)
    }
    assert 1.2e12 < one[False] < 1.3e12
    assert 0.08e12 < one[True] < 0.09e12


def test_v1_has_one_query_set_and_no_pyramid():
    shape = ProjectorConfig("v1", 4096, 1024, (1,), 12)
    parts = flops.projector(GRIDS, shape, folded=True)
    assert parts == flops.projector(GRIDS, shape, folded=False)
    assert "cat" not in parts and flops.jbu(GRIDS, shape, folded=True) == {}
    hiwin = flops.projector(GRIDS, ProjectorConfig("hiwin", 4096, 1024, (1,), 12), folded=False)
    assert 4 * parts["key"].flops == hiwin["key"].flops


@given(st.integers(1, 4000), st.integers(1, 4))
def test_kv_cache_grows_by_a_row_a_position(positions, bytes_per):
    for shape in OFFICIAL.values():
        row = 2 * shape.layers * shape.kv_heads * shape.head_size * bytes_per
        assert kv_cache_bytes(shape, positions, bytes_per) == row * positions


def test_sizes_of_vicuna_7b():
    language = OFFICIAL["Vicuna-7B"]
    assert language_bytes(language) == 13_476_298_752
    assert kv_cache_bytes(language, 1066) == 1066 * 2**19
    assert language_bytes(language, flops.INT4_BYTES) < 4.1e9
