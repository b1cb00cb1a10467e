"""The kernel bench and the tuner on small matrices: real operations, real rows; the tuner runs in the interpreter."""

import json
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from mbdist.bench import kernels as kernel_bench
from mbdist.bench import tune as tuner
from mbdist.bench.kernel_goals import GOALS, STEP, goal_table
from mbdist.bench.kernels import bench_kernels
from mbdist.bench.other_kernels import why_not
from mbdist.cli.main import app
from mbdist_kernels import launch, linear_decode, native, registration


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(kernel_bench, "_SECONDS", 0.0)
    monkeypatch.setattr(kernel_bench, "_ROTATED_BYTES", 1 << 16)


def test_rows_name_operation_shape_and_baseline(tmp_path):
    results = tmp_path / "kernels.json"
    rows = bench_kernels(["64x96"], [1, 2], [1, 32], results)
    written = json.loads(results.read_text())
    assert written["rows"] == rows and written["copy_gb_s"] > 0 and "cpu" in written["device"]
    assert {row["planes"] for row in rows} == {1, 2} and {row["batch"] for row in rows} == {0, 1, 32}
    decoding = next(row for row in rows if row["op"] == "linear, forward" and row["batch"] == 1)
    assert decoding["shape"] == "64x96" and decoding["us"] > 0 and decoding["baseline_us"] > 0 < decoding["floor_us"]
    assert {row["op"] for row in rows} == {op for op in kernel_bench.OPERATIONS if ":" not in op}


@pytest.mark.skipif(native.accelerator() is None, reason="no compiler for the CPU accelerator")
def test_matrices_on_one_input_are_decoded_together_beside_one_dense_matrix(tmp_path):
    rows = bench_kernels(["64+8+8x96", "64x96"], [2], [1, 4, 32], tmp_path / "kernels.json")
    together = [row for row in rows if row["shape"] == "64+8+8x96"]
    assert [(row["op"], row["batch"]) for row in together] == [("linear, forward", 1), ("linear, forward", 4)]
    alone = next(row for row in rows if row["op"] == "linear, forward" and row["batch"] == 1 and row not in together)
    assert together[0]["floor_us"] / alone["floor_us"] == pytest.approx((80 * 3 + 80 + 3 * 96) / (64 * 3 + 64 + 96))


def test_rows_of_other_shapes_are_kept_and_the_same_ones_replaced(tmp_path):
    results = tmp_path / "kernels.json"
    bench_kernels(["32x64"], [1], [1], results)
    before = json.loads(results.read_text())
    for row in before["rows"]:
        row["us"] = -1
    others = [before["rows"][0] | {"shape": "1x1"}, before["rows"][0] | {"op": "as it was called before"}]
    results.write_text(json.dumps(before | {"rows": [*before["rows"], *others]}))
    rows = bench_kernels(["32x64"], [1], [1], results)
    assert json.loads(results.read_text())["rows"][1:] == rows and len(rows) == len(before["rows"])
    assert all(row["us"] > 0 for row in rows)
    results.write_text(json.dumps(before | {"device": "another"}))
    bench_kernels(["32x64"], [1], [1], results)
    assert json.loads(results.read_text())["rows"][0]["us"] > 0, "rows of another device are not mixed in"


def test_goals_say_whether_they_were_reached_or_not_measured():
    row = {"op": "linear, forward", "shape": "28672x8192", "planes": 1, "batch": 1, "us": 19.0, "baseline_us": 156.0}
    assert set(goal_table([row], False).columns[6].cells) == {"not measured"}
    found = goal_table([row], True)
    reached = [value for value in found.columns[7].cells if value]
    assert reached == ["no", "yes"], "over 18 us, but an eighth of the dense product"
    assert why_not("gemlite") and why_not("torch") == (None if torch.cuda.is_available() else "needs a GPU")


def test_goals_of_a_whole_model_and_a_whole_step_are_sums_of_rows():
    shapes = {"8192x8192": 7.0, "8192+1024+1024x8192": 9.0, "28672+28672x8192": 39.0, "8192x28672": 21.0}
    row = {"op": "linear, forward", "planes": 1, "batch": 1, "baseline_us": 100.0}
    rows = [row | {"shape": shape, "us": us} for shape, us in shapes.items()]
    rows += [row | {"shape": "8192x8192", "batch": 8192, "op": op, "us": 107.0} for op in STEP]

    def measured(of, planes, rows):
        table = [list(column.cells) for column in goal_table(rows, True).columns]
        return next(cells[6:] for cells in zip(*table, strict=True) if cells[0] == of and cells[2] == planes)

    assert measured("all linear layers", "1", rows) == ("6,080.00", "no")  # 80 * (7 + 9 + 39 + 21)
    assert measured("forward, dX and dW", "1", rows) == ("1.07", "yes")
    assert measured("all linear layers", "3", rows) == ("not measured", "")
    assert measured("all linear layers", "1", rows[1:]) == ("not measured", "")


@pytest.mark.parametrize(("on_gpu", "families"), [(False, ["13b"]), (True, ["13b", "70b"])])
def test_by_default_a_gpu_is_measured_on_all_that_goals_are_of(monkeypatch, on_gpu, families):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(kernel_bench, "bench_kernels", lambda *arguments: asked.extend(arguments))
    assert CliRunner().invoke(app, ["bench", "kernels"]).exit_code == 0
    shapes, planes, tokens, _ = asked
    assert shapes == [shape for family in families for shape in kernel_bench.SHAPES[family]]
    if on_gpu:
        names = {*shapes, "70b"}
        for goal in GOALS:
            assert goal.shape in names and goal.planes in planes and goal.batch in (0, *tokens)


def test_a_shape_that_is_none_is_refused():
    found = CliRunner().invoke(app, ["bench", "kernels", "--shape", "big"])
    assert found.exit_code != 0 and "5120x5120" in str(found.exception)


@pytest.mark.skipif(native.accelerator() is None, reason="no compiler for the CPU accelerator")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which is tuned instead")
def test_tuning_a_cpu_finds_from_how_many_tokens_on_a_dense_weight_pays(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "tune_cpu", partial(tuner.tune_cpu, shape=(32, 64), planes=(1, 3)))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    found = CliRunner().invoke(app, ["tune"])
    assert found.exit_code == 0, found.output
    table = json.loads((tmp_path / "cpu.json").read_text())["dense_from_cpu"]
    assert table.keys() == {"K=1", "K=3"} and all(
        value["tokens"] in (*tuner._TOKENS_CPU, 32) for value in table.values()
    )
    launch.measured.cache_clear()
    try:
        assert launch.settings("dense_from_cpu", 3) == table["K=3"]
        assert launch.settings("dense_from_cpu", 2) == launch.rule("dense_from_cpu", 2)
    finally:
        monkeypatch.undo()
        launch.measured.cache_clear()


def test_a_dense_weight_pays_from_where_it_always_wins(monkeypatch):
    weight = (None, torch.ones(1, 4), torch.ones(1, 4))
    for wins, expected in (([1, 1, 1], 2), ([0, 1, 1], 4), ([1, 0, 1], 8), ([1, 1, 0], 16)):
        times = iter([us for won in wins for us in ((1, 2) if won else (2, 1))])
        monkeypatch.setattr(tuner, "median_us", lambda calls, device, times=times: next(times))
        assert tuner._dense_from(weight, (2, 4, 8), linear_decode) == expected


def test_tuning_a_cpu_without_the_accelerator_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "accelerator", lambda: None)
    found = CliRunner().invoke(app, ["tune"])
    assert found.exit_code != 0 and "nothing to tune" in str(found.exception)


@pytest.mark.slow
def test_the_tuner_writes_a_table_that_kernels_read(tmp_path, monkeypatch):
    few = {"BLOCK_ROWS": (32,), "num_warps": (4,), "BLOCK": (1024, 2048)}

    def fewer(*arguments):
        for operation, bucket, calls, grid in real(*arguments):
            yield operation, bucket, calls[:1], {key: few.get(key, values[:1]) for key, values in grid.items()}

    real = tuner._operations
    monkeypatch.setattr(tuner, "_operations", fewer)
    monkeypatch.setattr(tuner, "_TOKENS", (17, 32))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    with registration.kernels_on_cpu():
        output = tmp_path / f"{launch.device_name()}.json"
        table = tuner.tune_kernels(output, torch.device("cpu"), (64, 128), (1,))
    launch.measured.cache_clear()
    try:
        assert launch.settings("dequantize", 1) == table["dequantize"]["K=1"] and table["dequantize"]["K=1"]
        assert launch.settings("vote")["BLOCK"] in (1024, 2048)
        assert launch.settings("dense_from", 1)["tokens"] in (17, 32, 64)
    finally:
        monkeypatch.undo()
        launch.measured.cache_clear()
