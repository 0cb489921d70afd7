"""The Triton kernels against their references, under Triton's interpreter on the CPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_inputs import jbu_inputs, window_inputs

from uhd_export.plugins.jbu import torch_op as jbu
from uhd_export.plugins.window_attention import torch_op as window
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.geometry import GRID_MODES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = {torch.float16: 1e-3, torch.bfloat16: 6e-3}


def relative(actual, expected):
    return ((actual.float() - expected).norm() / expected.norm()).item()


def assert_close(actual, expected, dtype):
    assert actual.dtype == dtype
    if dtype == torch.float32:
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)
    else:
        assert relative(actual, expected) < HALF[dtype]


def guarded(tensor):
    """The same values with NaN behind them, so that what a kernel reads beyond its inputs shows."""
    storage = torch.full((tensor.numel() + 4096,), torch.nan, dtype=tensor.dtype)
    storage[: tensor.numel()] = tensor.flatten()
    return storage[: tensor.numel()].view(tensor.shape)


def check_jbu(inputs, dtype):
    """Kernel in `dtype` against the float32 reference on the same, rounded inputs."""
    rounded = [guarded(tensor.to(dtype)) for tensor in inputs.values()]
    expected = torch.ops.uhd.jbu(*(tensor.float() for tensor in rounded))
    assert_close(jbu.launch(*rounded), expected, dtype)


def check_window(position, value, value_moments, levels, dtype):
    shared = [guarded(tensor.to(dtype)) for tensor in (position, value, value_moments)]
    levels = [guarded(tensor.to(dtype)) for tensor in levels]
    expected = torch.ops.uhd.window_attention(*(t.float() for t in shared), [t.float() for t in levels])
    assert_close(window.launch(*shared, levels), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_jbu_over_tiles_and_channel_blocks(dtype):
    # Several tiles both ways, none of them full at the border; a channel count that no block divides.
    check_jbu(jbu_inputs(2, 5, 11, 72), dtype)


@pytest.mark.slow
@settings(max_examples=8)
@given(
    batch=st.integers(1, 2),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    channels=st.sampled_from((1, 8, 16, 20, 33)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_jbu_equals_reference(batch, height, width, channels, dtype, seed):
    check_jbu(jbu_inputs(batch, height, width, channels, seed), dtype)


@pytest.mark.parametrize("temperature", [-20.0, 20.0])
def test_jbu_temperature_is_clamped(temperature):
    # To 1e-4 and 1e4, where similarities of 0 or about 1e4 and 1e-4 give logits of 0 or 1.
    inputs = jbu_inputs(1, 4, 5, 8) | {"range_temp": torch.tensor(temperature)}
    for name in ("range_in_weight", "range_in_bias", "range_out_weight", "range_out_bias"):
        inputs[name] = torch.zeros_like(inputs[name])
    inputs["range_in_weight"][0, 0] = inputs["range_out_weight"][0, 0] = 1
    inputs["guidance"] = (inputs["guidance"] > 0) * (100.0 if temperature < 0 else 0.02)
    check_jbu(inputs, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_attention_three_levels(dtype):
    check_window(*window_inputs(2, 3, 5, (1, 2, 4), "selective", 2, 40, 3), dtype)


@pytest.mark.slow
@settings(max_examples=6)
@given(
    batch=st.integers(1, 2),
    rows=st.integers(2, 6),
    cols=st.integers(2, 6),
    scales=st.sampled_from(((1,), (1, 2), (1, 4), (1, 2, 4))),
    grid_mode=st.sampled_from(GRID_MODES),
    roi_rounding=st.sampled_from(("exact", "bf16")),
    side=st.integers(1, 2),
    channels=st.sampled_from((8, 16, 20)),
    heads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_window_attention_equals_reference(
    batch, rows, cols, scales, grid_mode, roi_rounding, side, channels, heads, dtype
):
    check_window(
        *window_inputs(batch, rows, cols, scales, grid_mode, side, channels, heads, roi_rounding), dtype
    )


@pytest.mark.slow
def test_window_attention_with_many_rows():
    # 8 x 12 bins at 4x in a single window: several chunks of rows everywhere, three programs a row of bins.
    arguments = window_inputs(1, 3, 2, (1, 4), "pyramid", 1, 16, 1)
    assert arguments[0].shape[1] == 2 * 3 + 8 * 12
    check_window(*arguments, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_window_attention_over_blocks_of_places_and_channels(dtype):
    # 36 places fill one block of 32 (16 in float32) and begin another; 72 channels no whole number of blocks;
    # a head size that is no power of two.
    check_window(*window_inputs(4, 2, 3, (1,), "fix", 3, 72, 2, size=20), dtype)


@pytest.mark.slow
def test_window_attention_with_more_queries_than_a_block():
    # 13B models have 40 heads: 160 queries.
    check_window(*window_inputs(1, 2, 2, (1,), "fix", 1, 16, 40), torch.float32)


def test_samples_beyond_the_map_weigh_nothing():
    # Windows smaller than a pixel are one pixel long, so the last samples fall outside: mass below one.
    *shared, levels = window_inputs(1, 3, 3, (1,), "fix", 4, 8, 1, roi_rounding="bf16")
    assert levels[2].sum(-1).min() < 0.99
    check_window(*shared, levels, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "cols"), [(7, 2), (2, 7)])
def test_windows_beyond_the_map_touch_nothing(rows, cols):
    # Twelve windows of at least a pixel over two patches: the last ones have no sample on the map.
    *shared, levels = window_inputs(1, rows, cols, (1,), "selective", 12, 8, 1)
    assert min(roi.flatten(1).count_nonzero(1).min() for roi in levels[2:4]) == 0
    check_window(*shared, levels, torch.float32)


def test_operators_are_well_formed():
    inputs = list(jbu_inputs(1, 2, 3, 8).values())
    torch.library.opcheck(torch.ops.uhd.jbu.default, inputs)
    torch.library.opcheck(
        torch.ops.uhd.window_attention.default, window_inputs(2, 3, 2, (1, 2), "fix", 2, 8, 1)
    )


def test_operators_compile_without_graph_breaks():
    inputs = list(jbu_inputs(1, 2, 3, 8).values())
    compiled = torch.compile(lambda *x: torch.ops.uhd.jbu(*x) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), torch.ops.uhd.jbu(*inputs) * 2)


def test_inputs_that_kernels_would_misread_are_refused():
    inputs = list(jbu_inputs(1, 2, 3, 8).values())
    small = [tensor[:, 1:] if i == 1 else tensor for i, tensor in enumerate(inputs)]
    with pytest.raises(UhdError, match=r"input guidance has shape \[1, 3, 6, 3\], expected \[1, 4, 6, 3\]"):
        jbu.launch(*small)
    with pytest.raises(UhdError, match=r"input source is torch.float64 on cpu; it must be float32"):
        jbu.launch(inputs[0].double(), *inputs[1:])
    position, *values, levels = window_inputs(2, 3, 2, (1,), "fix", 2, 8, 1)
    with pytest.raises(UhdError, match="input query_mass_0 has shape"):
        window.launch(position, *values, [*levels[:-1], levels[-1][:, 1:]])
    with pytest.raises(UhdError, match=r"input position has shape \[4, 8, 4\], expected \[4, 9, 4\]"):
        window.launch(position[:, 1:], *values, levels)
