# SPDX-License-Identifier: Apache-2.0
"""Series: forms that are accepted, gaps, ragged rows, order in time, and errors that teach."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from pyro_latentde.data import Series
from pyro_latentde.errors import DataError, ShapeError

NAN = float("nan")


def values_with_nan(series):
    return series.values.masked_fill(~series.mask, NAN)


@pytest.mark.parametrize(
    "times, values, shape",
    [
        ([0.0, 1.0, 2.0], [5.0, 6.0, 7.0], (1, 3, 1)),
        ([0, 1, 2], [[5, 6], [7, 8], [9, 1]], (1, 3, 2)),
        (torch.arange(3.0), torch.ones(4, 3, 2), (4, 3, 2)),
        (torch.arange(12.0).reshape(4, 3), torch.ones(4, 3), (4, 3, 1)),
        (np.arange(3), np.ones((3, 2)), (1, 3, 2)),
        ([torch.arange(3.0), torch.arange(2.0)], [torch.ones(3, 2), torch.ones(2, 2)], (2, 3, 2)),
        ([[0.0, 1.0, 2.0], [0.0, 3.0]], [[1.0, 2.0, 3.0], [4.0, 5.0]], (2, 3, 1)),
    ],
)
def test_forms_of_input(times, values, shape):
    series = Series.from_tensors(times, values)
    assert series.times.shape == shape[:2]
    assert series.values.shape == series.mask.shape == shape
    assert len(series) == shape[0] and series.num_values == shape[2]
    assert series.mask.dtype == torch.bool and series.values.is_floating_point()


def test_dtype_is_kept_or_float64():
    assert Series.from_tensors(torch.arange(2.0), torch.ones(2)).values.dtype == torch.float32
    assert Series.from_tensors([0, 1], [1, 2]).times.dtype == torch.float64
    assert Series.from_tensors([0, 1], [1, 2], dtype=torch.float32).times.dtype == torch.float32


def test_missing_values_never_stay_nan():
    values = [[1.0, NAN], [NAN, NAN], [NAN, 8.0], [4.0, 9.0]]
    series = Series.from_tensors([0.0, 1.0, 2.0, 3.0], values)
    expected = torch.tensor([[[True, False], [False, False], [False, True], [True, True]]])
    assert torch.equal(series.mask, expected)
    # the nearest observation of the same state; the earlier one where two are as near
    assert_close(series.values[0], torch.tensor([[1.0, 8.0], [1.0, 8.0], [4.0, 8.0], [4.0, 9.0]]).double())
    assert series.n_observed == 4 and not series.complete


def test_state_never_observed_in_a_series_borrows_from_others():
    values = torch.tensor([[[1.0, NAN], [2.0, NAN]], [[3.0, 0.25], [4.0, NAN]]])
    series = Series.from_tensors([0.0, 1.0], values)
    assert_close(series.values[0, :, 1], torch.tensor([0.25, 0.25]).double())
    never = Series.from_tensors([0.0, 1.0], [[1.0, NAN], [2.0, NAN]])
    assert_close(never.values[0, :, 1], torch.ones(2).double())


def test_explicit_mask_joins_nan():
    series = Series.from_tensors([0.0, 1.0], [[1.0, NAN], [2.0, 3.0]], mask=[[True, True], [False, True]])
    assert series.mask.tolist() == [[[True, False], [False, True]]]


def test_ragged_rows_repeat_their_last_time_and_are_masked():
    series = Series.from_tensors([[0.0, 1.0, 4.0], [2.0, 3.0]], [[1.0, 2.0, 3.0], [4.0, 5.0]])
    assert series.times.tolist() == [[0.0, 1.0, 4.0], [2.0, 3.0, 3.0]]
    assert series.mask[..., 0].tolist() == [[True, True, True], [True, True, False]]


def test_times_are_sorted_and_replicates_keep_their_order():
    times, values = [3.0, 0.0, 1.0, 1.0, 0.0], [30.0, 0.1, 10.1, 10.2, 0.2]
    series = Series.from_tensors(times, values)
    assert series.times.tolist() == [[0.0, 0.0, 1.0, 1.0, 3.0]]
    assert_close(series.values[0, :, 0], torch.tensor([0.1, 0.2, 10.1, 10.2, 30.0]).double())


def test_unsorted_ragged_rows_are_padded_at_the_end():
    series = Series.from_tensors([[0.0, 1.0, 2.0], [5.0, 0.0]], [[1.0, 2.0, 3.0], [50.0, 1.0]])
    assert series.times[1].tolist() == [0.0, 5.0, 5.0]
    assert series.mask[1, :, 0].tolist() == [True, True, False]
    assert series.values[1, :2, 0].tolist() == [1.0, 50.0]


def test_sorting_moves_mask_and_inputs_along():
    inputs = [[1.0], [2.0], [3.0]]
    series = Series.from_tensors([2.0, 0.0, 1.0], [NAN, 5.0, 6.0], inputs=inputs)
    assert series.inputs[0, :, 0].tolist() == [2.0, 3.0, 1.0]
    assert series.mask[0, :, 0].tolist() == [True, True, False]


def long_table():
    return pd.DataFrame(
        {
            "who": ["b", "b", "a", "b", "a"],
            "t": [1.0, 0.0, 0.0, 2.0, 7.0],
            "x": [11.0, 10.0, 20.0, NAN, 21.0],
            "y": [1, 2, 3, 4, 5],
            "dose": [0.1, 0.0, 0.0, 0.2, 0.7],
            "weight": [70.0, 70.0, 60.0, 70.0, 60.0],
        }
    )


def test_from_dataframe():
    series = Series.from_dataframe(
        long_table(), series="who", time="t", values=["x", "y"], inputs=["dose"], covariates=["weight"]
    )
    assert series.ids == ("b", "a") and series.names == ("x", "y")
    assert series.times.tolist() == [[0.0, 1.0, 2.0], [0.0, 7.0, 7.0]]
    expected = torch.tensor([[[10, 2], [11, 1], [NAN, 4]], [[20, 3], [21, 5], [NAN, NAN]]]).double()
    assert_close(values_with_nan(series), expected, equal_nan=True)
    assert_close(series.covariates, torch.tensor([[70.0], [60.0]]).double())
    assert_close(series.inputs[0, :, 0], torch.tensor([0.0, 0.1, 0.2]).double())


def test_from_csv_equals_from_dataframe(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("# units: m\n" + long_table().to_csv(index=False))
    kwargs = {"series": "who", "time": "t", "values": ["x", "y"]}
    ours, other = Series.from_csv(path, **kwargs), Series.from_dataframe(long_table(), **kwargs)
    assert torch.equal(ours.values, other.values) and torch.equal(ours.mask, other.mask)


def test_one_series_without_a_column_for_it():
    series = Series.from_dataframe(pd.DataFrame({"t": [0, 1], "x": [1, 2]}), time="t", values="x")
    assert len(series) == 1 and series.ids is None and series.names == ("x",)


def test_indexing():
    numbers = torch.arange(8.0).reshape(4, 2)
    series = Series.from_tensors(numbers, numbers, ids="abcd", covariates=torch.ones(4, 1))
    assert series[1].ids == ("b",) and series[1].values.shape == (1, 2, 1)
    assert series[-1].ids == ("d",)
    assert series[1:3].ids == ("b", "c")
    assert series[[3, 0]].values[:, 0, 0].tolist() == [6.0, 0.0]
    assert series[torch.tensor([2, 1])].ids == ("c", "b")
    assert series[torch.tensor([True, False, False, True])].ids == ("a", "d")
    assert [one.ids for one in series] == [("a",), ("b",), ("c",), ("d",)]
    with pytest.raises(IndexError, match="series 4 of 4"):
        series[4]


def test_to_moves_floats_only_and_repr():
    series = Series.from_tensors([0.0, 1.0], [[1.0, NAN], [2.0, 3.0]], names=("u", "v")).to(torch.float32)
    assert series.values.dtype == series.times.dtype == torch.float32 and series.mask.dtype == torch.bool
    assert repr(series) == "Series(1 series, 2 times, 2 values (u, v), 3 observed, 1 missing)"


def test_at_times_has_no_values():
    series = Series.at_times([[2.0, 0.0, 1.0], [5.0]], names=("u", "v"))
    assert series.values is None and series.num_values == 2 and series.n_observed == 0
    assert series.times.tolist() == [[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]
    assert series.mask[..., 0].tolist() == [[True, True, True], [True, False, False]]
    assert "no values" in repr(series)


def test_at_times_knows_people_doses_and_inputs():
    """One set of times for all of them, as many as there are covariates; or times of their own."""
    dose = [[100.0], [200.0]]
    plan = Series.at_times([2.0, 0.0, 1.0], ids=["Ann", "Bo"], covariates=dose, inputs=[[5.0], [3.0], [4.0]])
    assert plan.times.tolist() == [[0.0, 1.0, 2.0]] * 2 and plan.mask.shape == (2, 3, 1)
    assert plan.inputs[..., 0].tolist() == [[3.0, 4.0, 5.0]] * 2  # sorted with the times
    assert plan.ids == ("Ann", "Bo") and plan.covariates.tolist() == dose and plan[1].ids == ("Bo",)
    own = Series.at_times([[0.0, 2.0], [1.0]], inputs=[[[7.0], [8.0]], [[9.0]]], dtype=torch.float32)
    assert own.inputs[:, 0, 0].tolist() == [7.0, 9.0] and own.inputs.dtype == torch.float32
    assert len(Series.at_times(torch.arange(3.0), inputs=torch.zeros(4, 3, 1))) == 4


PLAN_ERRORS = [
    ({"ids": ["Ann", "Bo"], "covariates": [100.0, 200.0]}, r"covariates: expected finite numbers \(2, 'K'\)"),
    ({"ids": ["Ann"], "covariates": [[1.0], [2.0]]}, "ids: 1 labels for 2 series"),
    ({"inputs": [[1.0, 2.0]]}, r"inputs look like \(D, T\): pass inputs.T"),
    ({"inputs": [[1.0], [NAN]]}, "inputs: expected finite"),
]


@pytest.mark.parametrize("kwargs, message", PLAN_ERRORS, ids=[e[1] for e in PLAN_ERRORS])
def test_errors_of_at_times_teach(kwargs, message):
    with pytest.raises(DataError, match=message):
        Series.at_times([0.0, 1.0], **kwargs)


def test_series_is_frozen():
    series = Series.from_tensors([0.0], [1.0])
    with pytest.raises(AttributeError):
        series.values = None


ERRORS = [
    (([0.0, NAN], [1.0, 2.0]), {}, "1 of 2 are NaN or infinite"),
    (([0.0, float("inf")], [1.0, 2.0]), {}, "a time may not"),
    (([0.0, 1.0], [1.0, float("inf")]), {}, "infinite entries"),
    (([0.0, 1.0, 2.0], torch.ones(2, 3)), {}, r"values look like \(D, T\): pass values.T, of shape \(3, 2\)"),
    (([0.0, 1.0, 2.0], torch.ones(3, 5, 2)), {}, r"\(T, N, D\): pass values.permute\(1, 0, 2\), .*\(5, 3"),
    (([0.0, 1.0, 2.0], torch.ones(5, 2, 3)), {}, r"\(N, D, T\): pass values.permute\(0, 2, 1\), .*\(5, 3"),
    (([0.0, 1.0, 2.0], torch.ones(2, 7)), {}, "the initial time as well"),
    (([0.0, 1.0], [1.0, 2.0, 3.0]), {}, "values do not fit the times"),
    ((torch.zeros(3, 2), torch.ones(4, 2, 1)), {}, "values do not fit the times"),
    ((torch.tensor(0.0), [1.0]), {}, "expected .T,. or .N, T."),
    (([0.0, 1.0], [NAN, NAN]), {}, r"series 0 have no observation at all \(of 1\)"),
    (([0.0], [[[1.0]], [[NAN]]]), {"ids": ["ann", "bob"]}, "series 'bob' have no observation"),
    (([0.0, 1.0], [1.0, 2.0]), {"names": ["a", "b"]}, "2 names .* for 1 values"),
    (([0.0, 1.0], [1.0, 2.0]), {"ids": [1, 2]}, "2 labels for 1 series"),
    (([0.0, 1.0], [1.0, 2.0]), {"covariates": [NAN]}, "covariates: expected finite"),
    (([0.0, 1.0], [1.0, 2.0]), {"inputs": [1.0, NAN]}, "inputs: expected finite"),
    (([[0.0, 1.0], [0.0]], [[1.0], [2.0, 3.0]]), {}, "lengths of times .* and of values .* differ"),
    (([[0.0, 1.0], []], [[1.0, 2.0], []]), {}, "empty; leave them out"),
    (([0.0, 1.0], ["a", "b"]), {}, "values: expected numbers"),
    (([0.0], [1.0 + 2.0j]), {}, "expected real numbers"),
]


@pytest.mark.parametrize("args, kwargs, message", ERRORS, ids=[e[2] for e in ERRORS])
def test_errors_teach(args, kwargs, message):
    with pytest.raises(DataError, match=message):
        Series.from_tensors(*args, **kwargs)


TABLE_ERRORS = [
    ({"time": "time", "values": "x"}, r"no column \['time'\]; its columns are \['who', 't'"),
    ({"time": "who", "values": "x"}, "'who' holds .*, expected numbers"),
    ({"time": "t", "values": []}, "at least one row and one column"),
    ({"time": "t", "values": "x", "series": "who", "covariates": ["dose"]}, "'dose' changes within .*'b'"),
    ({"time": "t", "values": "x", "series": "x"}, "1 rows belong to no series"),
    ({"time": "T", "values": "x"}, r"no column \['T'\].*did you mean 't'"),
]


@pytest.mark.parametrize("kwargs, message", TABLE_ERRORS, ids=[e[1] for e in TABLE_ERRORS])
def test_table_errors_teach(kwargs, message):
    with pytest.raises(DataError, match=message):
        Series.from_dataframe(long_table(), **kwargs)


BAD_FILES = [
    ("", "is empty; expected a line of column names"),
    ("t,x\n", "has no rows, only the columns"),
    ("t,x\n0,1\n1,2,3,4\n", "cannot be read as CSV text .*line 3"),
    ("# counts\n\nt,x,x\n0,1,2\n", r"names \['x'\] occur more than once"),
    ("t;x\n0;1\n", "separated by ';'; expected commas"),
    ("t,x\n0,1\n1,n/d\n2,3\n3,?\n", "'x' holds .*; row 2 'n/d', row 4 '[?]', counted"),
    ("t,x\n0,1\n1 pm,2\n", "'t' holds .*; row 2 '1 pm'"),
    ("t,x\n0,1\n,2\n2,3\n,4\n", "2 rows have no time .rows 2, 4."),
]


@pytest.mark.parametrize("text, message", BAD_FILES, ids=[e[1] for e in BAD_FILES])
def test_bad_files_are_explained(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        Series.from_csv(tmp_path / "x.csv", time="t", values="x")


def test_a_file_that_is_none(tmp_path):
    for path, message in ((tmp_path / "absent.csv", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(DataError, match=message):
            Series.from_csv(path, time="t", values="x")
    (tmp_path / "x.xls").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="Save it as CSV"):
        Series.from_csv(tmp_path / "x.xls", time="t", values="x")


def test_constructor_checks_shapes():
    with pytest.raises(DataError, match="from_tensors takes other forms"):
        Series(times=torch.zeros(2), values=torch.zeros(2), mask=torch.ones(2, dtype=torch.bool))


def pictures():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(5, 6, 12, generator=generator)
    inputs = torch.rand(5, 6, 1, generator=generator)
    return Series.from_tensors(
        torch.arange(6.0), values, frame=(3, 4), ids=list("abcde"), inputs=inputs, covariates=torch.arange(5.0)[:, None]
    )


def test_frame_is_kept():
    series = pictures()
    parts = (series[2], series[1:3], series[torch.tensor([True, False, True, False, True])], series.batch([3, 1]))
    assert all(part.frame == (3, 4) for part in (*parts, series.window(2, 3), series.to(torch.float64)))
    with pytest.raises(ShapeError, match=r"\(3, 5\) has 3 x 5 = 15 values, but the series have 12"):
        Series.from_tensors(torch.arange(6.0), series.values, frame=(3, 5))


def test_batch_says_where_it_is_from():
    series = pictures()
    batch = series.batch(torch.tensor([3, 1]))
    assert batch.index.tolist() == [3, 1] and batch.index.dtype == torch.int64 and batch.population == 5
    assert batch.ids == ("d", "b") and torch.equal(batch.values, series.values[[3, 1]])
    assert series.index is None and series.population is None and series[[3, 1]].index is None
    again = batch.batch([1])
    assert again.index.tolist() == [1] and again.population == 5  # of the first data set
    assert batch.to(torch.float64).index.dtype == torch.int64
    for index, message in (([], "positions"), ([0, 5], "0 to 5"), ([-1], "-1"), ([[0]], r"\(1, 1\)")):
        with pytest.raises(DataError, match=message):
            series.batch(index)
    with pytest.raises(DataError, match="no series left of 5"):
        series[torch.zeros(5, dtype=torch.bool)]


def test_window_cuts_each_series():
    series = pictures()
    starts = torch.tensor([0, 3, 1, 2, 0])
    window = series.window(starts, 3)
    assert window.time_weight == 1.0 and window.population is None
    for i, start in enumerate(starts.tolist()):
        assert torch.equal(window.times[i], torch.arange(start, start + 3.0))
        assert torch.equal(window.values[i], series.values[i, start : start + 3])
        assert torch.equal(window.mask[i], series.mask[i, start : start + 3])
        assert torch.equal(window.inputs[i], series.inputs[i, start : start + 3])
    assert torch.equal(window.covariates, series.covariates)
    same = series.window(1, 3)
    assert torch.equal(same.values, series.window([1] * 5, 3).values)
    sampled = series.window(1, 3, sample=True)
    assert torch.equal(sampled.values, same.values) and sampled.time_weight == 2.0
    assert sampled.window(0, 2).time_weight == 2.0 and sampled.window(0, 2, sample=True).time_weight == 3.0
    both = series.batch([4, 0]).window([1, 2], 2, sample=True)
    assert both.index.tolist() == [4, 0] and both.time_weight == 3.0


def test_window_must_lie_in_the_series():
    series = pictures()
    with pytest.raises(DataError, match="window: 7 times from series of 6"):
        series.window(0, 7)
    for start in (4, -1, [0, 0, 0, 0, 4], [0, 1]):
        with pytest.raises(DataError, match="from 0 to 3"):
            series.window(start, 3)


def test_window_without_observation():
    series = Series.from_tensors([0.0, 1.0, 2.0, 3.0], [1.0, 2.0, NAN, NAN])
    window = series.window(2, 2)
    assert window.n_observed == 0 and not window.complete and window.values.isfinite().all()
    assert series.window(0, 2).complete
