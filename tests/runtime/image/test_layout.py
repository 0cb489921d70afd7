import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import (
    LAYOUTS,
    Separators,
    indicator_tokens,
    layout_indices,
    visual_token_count,
)

grids = st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9)))
layouts = st.sampled_from(LAYOUTS)


@given(grids, layouts, st.sampled_from([8, 12, 16]), st.integers(0, 99), st.integers(100, 199))
def test_every_visual_token_once_and_separators_between(grid, layout, side, comma, newline):
    separators = Separators(comma, newline)
    source, tokens = layout_indices(grid, layout=layout, side=side, separators=separators)
    cols, rows = grid or (0, 0)
    visual = source[source >= 0]
    assert sorted(visual) == list(range((cols * rows + 1) * side * side))
    assert np.array_equal(source < 0, tokens >= 0)
    assert list(visual[-side * side :]) == list(range(cols * rows * side * side, len(visual)))
    assert (source[-side * side :] >= 0).all()
    found = tokens[tokens >= 0].tolist()
    if layout == "flat":
        assert found == indicator_tokens(grid, separators)
    elif grid:
        assert found == [newline] * (rows * side) + [indicator_tokens(grid, separators)[0]]
    else:
        assert found == []
    assert visual_token_count(grid, layout=layout, side=side) == len(source)


@given(st.integers(1, 9), st.integers(1, 9))
def test_flat_ends_each_slice_with_its_separator(cols, rows):
    separators = Separators()
    source, tokens = layout_indices((cols, rows), layout="flat", side=12, separators=separators)
    ends = np.flatnonzero(source < 0)
    assert list(ends) == [145 * (i + 1) - 1 for i in range(cols * rows)]
    at_row_end = [(i + 1) % cols == 0 for i in range(cols * rows)]
    assert list(tokens[ends]) == [separators.newline if e else separators.comma for e in at_row_end]


@given(st.integers(1, 6), st.integers(1, 6))
def test_merged_reads_the_stitched_map_in_raster_order(cols, rows):
    side = 12
    source, _ = layout_indices((cols, rows), layout="merged", side=side, separators=Separators())
    position = 0
    for y in range(rows * side):
        for x in range(cols * side):
            crop, inside = (y // side) * cols + x // side, (y % side) * side + x % side
            assert source[position] == crop * side * side + inside
            position += 1
        assert source[position] == -1
        position += 1
    assert source[position] == -1 and source[position + 1] == cols * rows * side * side


def test_counts_at_1008x672():
    assert visual_token_count((3, 2), layout="flat") == 1014
    assert visual_token_count((3, 2), layout="merged") == 1033
    assert visual_token_count(None, layout="flat") == visual_token_count(None, layout="merged") == 144


def test_single_column_separator_is_a_newline():
    assert indicator_tokens((1, 3), Separators()) == [13, 13, 13]
    tokens = layout_indices((1, 3), layout="merged", side=12, separators=Separators())[1]
    assert set(tokens[tokens >= 0]) == {13}


def test_unknown_layout_is_named():
    with pytest.raises(UhdError, match="layout 'stacked': must be one of flat, merged"):
        layout_indices((2, 2), layout="stacked", side=12, separators=Separators())
