"""The benches of communication run, and what they write is what was measured."""

import json
import os
import shutil

import models
import pytest
from ranks import run_on_ranks

from mbdist.bench import codecs
from mbdist.bench.codecs import bench_codecs
from mbdist.bench.comm import bench_comm
from mbdist.bench.links import joined_hosts
from mbdist.bench.scaling import scaling_table
from mbdist.config import load_config
from mbdist.errors import UserError

can_make_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"), reason="needs root and iproute2"
)


@pytest.mark.slow
@can_make_namespaces
def test_bytes_are_those_of_the_interface_and_slow_links_are_slow(tmp_path):
    model = models.save_small_model(tmp_path / "model")
    overrides = [f"model.path={model}", "model.gguf_file=null", "data.window=32", f"data.cache_dir={tmp_path}/cache"]
    config = load_config("configs/comm.yaml", overrides)
    result = bench_comm(config, [2], [2], ["fp32", "sign"], [0, 1], tmp_path / "comm.json", everything=True)
    assert json.loads((tmp_path / "comm.json").read_text()) == result
    whole, signs, everything = result["bytes"]
    assert [row["trained"] for row in result["bytes"]] == ["linear", "linear", "everything"]
    assert everything["ours_bytes"] > signs["ours_bytes"] and everything["dense_bytes"] > signs["dense_bytes"]
    assert everything["ratio"] < signs["ratio"], "embeddings cost both sides the same"
    assert whole["ours_bytes"] - signs["ours_bytes"] > 0.9 * (whole["counted"]["signal"] - signs["counted"]["signal"])
    for row in result["bytes"]:
        counted = sum(row["counted"].values())
        assert counted < row["ours_bytes"] < 1.3 * counted + 20_000, "headers and barriers weigh more in a small model"
    free, slow = result["time"]
    least = signs["ours_bytes"] * 8 / 1e6  # seconds at 1 Mbit/s, less the bucket's first burst
    assert slow["ours_comm_s"] > 0.5 * least - 1 and slow["dense_s"] > free["dense_s"]


def _sent_by_a_dense_step(config):
    """Bytes that a rank sends in the third step, by what they carry, a linear weight."""
    from mbdist.bench.train import DenseTrainer
    from mbdist.comm.communicator import Communicator
    from mbdist.engine.traffic import count_traffic
    from mbdist.train.environment import set_up_worker

    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    trainer, communicator = DenseTrainer(config, set_up_worker(config)), Communicator(60)
    count_traffic(communicator)
    for number in range(3):
        communicator.bytes_sent.clear()
        trainer.step(number)
    return {name: size / trainer.linear_weights for name, size in communicator.bytes_sent.items()}


@pytest.mark.slow
def test_the_dense_baseline_gathers_a_small_model_once_a_step(tmp_path):
    """As DeepSpeed by itself does, whose defaults keep so few weights from forward to backward."""
    model = models.save_small_model(tmp_path / "model")
    overrides = [f"model.path={model}", "model.gguf_file=null", "data.window=32", f"data.cache_dir={tmp_path}/cache"]
    dense = ["loss.teacher=none", "cluster.device=cpu", "cluster.zero_stage=3", "comm.resident_floats=frozen"]
    config = load_config("configs/comm.yaml", [*overrides, *dense, "floats.also_train=[]", "train.precision=bf16"])
    for sent in run_on_ranks(2, tmp_path, _sent_by_a_dense_step, config):
        assert sent["floats"] == pytest.approx(1, abs=0.01), "half of the weights' 2 bytes"
        assert sent["float gradients"] == pytest.approx(2, abs=0.01), "gloo's reduce-scatter is an all-reduce"


@can_make_namespaces
def test_hosts_are_removed_when_something_fails():
    before = set(os.listdir("/var/run/netns")) if os.path.isdir("/var/run/netns") else set()
    with pytest.raises(UserError, match="broken"), joined_hosts(2) as hosts:
        assert hosts[0].namespace in os.listdir("/var/run/netns")
        raise UserError("broken")
    assert set(os.listdir("/var/run/netns")) <= before


@pytest.mark.slow
def test_codecs_are_compared_at_equal_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(
        codecs, "_VARIANTS", [v for v in codecs._VARIANTS if v[0] in ("fp32", "no flips", "sign, rank1")]
    )
    config = load_config("configs/codecs.yaml", ["train.steps=20", "data.max_eval_windows=8"])
    rows = bench_codecs(config, tmp_path / "codecs.json")
    assert json.loads((tmp_path / "codecs.json").read_text()) == rows
    whole, none, signs = rows
    assert whole["bits_per_weight"] == 32 and none["bits_per_weight"] == 0 and 1 < signs["bits_per_weight"] < 1.3
    assert whole["flip_rate"] > 0 and signs["flip_rate"] > 0 and none["flip_rate"] == 0
    assert len({row["perplexity"] for row in rows}) == 3


def test_the_70b_table_is_printed(capsys):
    scaling_table([8, 1024], "sign", 2, 8)
    printed = capsys.readouterr().out
    assert "1024" in printed and "9.5" in printed
