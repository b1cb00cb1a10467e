"""A real Ray cluster of three nodes on this machine; jobs come from outside it."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

import models
import processes
import psutil
import pytest
import yaml

from mbdist.config.convert import ConvertConfig
from mbdist.config.model import ModelConfig
from mbdist.convert import Conversion
from mbdist.convert.initialize import in_turn
from mbdist.model.hashing import hash_planes
from mbdist.model.loading import load_model
from mbdist.train.metrics import read_metrics
from mbdist_launch.spread import spread_over

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}  # the cluster lets in who has it

# A node that is gone is known to be after seconds; workers do not wait for what else runs on this machine.
NODES = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "5000", "RAY_worker_niceness": "0"}


def start_node(log, *arguments):
    """A process that has all processes of a node for children. One after the other: they choose ports."""
    command = ["ray", "start", "--block", "--disable-usage-stats", "--num-cpus=1", *arguments]
    with log.open("w") as output:
        node = subprocess.Popen(command, env=os.environ | TOKEN | NODES, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while "will now block" not in log.read_text():
        assert node.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.1)
    return node


def processes_of(node):
    return [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]


def runs_a_worker(node):
    for process in processes_of(node):
        with contextlib.suppress(psutil.Error):
            if "TrainWorker" in " ".join(process.cmdline()):
                return True
    return False


def kill_node(node):
    """As if its power went: no process of it gets to say goodbye."""
    for process in processes_of(node):
        with contextlib.suppress(psutil.Error):
            process.kill()
    node.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(address of the job server, nodes: the head and two more, what starts one more)."""
    port, dashboard = processes.free_port(), processes.free_port()
    logs = tmp_path_factory.mktemp("cluster")
    # In Ray's usual folder an address would stay behind, where later runs on this machine would look for a cluster. Its
    # sockets need a short path.
    scratch = tempfile.mkdtemp(prefix="ray-")
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={scratch}"]
    kinds = [head, *[[f"--address=127.0.0.1:{port}"]] * 2]
    nodes = [
        start_node(logs / str(number), *kind, f"--dashboard-agent-listen-port={processes.free_port()}")
        for number, kind in enumerate(kinds)
    ]

    def start_another():
        options = (kinds[1][0], f"--dashboard-agent-listen-port={processes.free_port()}")
        nodes.append(start_node(logs / str(len(nodes)), *options))

    yield f"http://127.0.0.1:{dashboard}", nodes, start_another
    for node in nodes:
        if node.poll() is None:
            kill_node(node)
    shutil.rmtree(scratch, ignore_errors=True)


def settings_of(run_dir, model, **cluster):
    return models.run_settings(
        run_dir,
        model,
        cluster={"workers": 2, "cpus_per_worker": 1, **cluster},
        data={"max_eval_windows": 2},
        train={"steps": 60},
        checkpoint={"every_steps": 10},
    )


def typed(command, folder):
    """Running, where the cluster's token and a secret are known and the cluster is not."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= TOKEN | {"A_SECRET": "hunter2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(["bash", "-c", command], cwd=folder, env=environment, **pipes)


def submit(settings, folder, address, *options):
    (folder / "submitted.yaml").write_text(yaml.safe_dump(settings))
    return typed(f"exec mbdist launch ray submitted.yaml --address {address} {' '.join(options)}", folder)


def submit_by_hand(settings, folder, address):
    """By the command that a dry run prints."""
    shown, _ = submit(settings, folder, address, "--dry-run").communicate()
    command = shown.partition("the same by hand: ")[2].replace("FOLDER_WITH_run.yaml", "package")
    (folder / "package").mkdir()
    (folder / "package/run.yaml").write_text(yaml.safe_dump(settings))
    return typed(f"exec {command}", folder)


def sizes(records):
    return [record["world_size"] for record in records if record["event"] == "start"]


def trains_on(fits):
    """Whether the number of workers fits by now, and they have done a step."""
    return lambda records: fits(sizes(records)[-1]) and records[-1]["event"] == "step"


def convert_over_the_cluster(model, folder):
    """Writes ``folder/found.json``: digests of a conversion here and over three workers, the nodes of nine jobs."""
    import ray

    def somewhere(number):
        time.sleep(1)
        return number, ray.get_runtime_context().get_node_id()

    source, config = ModelConfig(path=model), ConvertConfig(planes=2, init="svid")
    with spread_over(3) as over_nodes:
        jobs = list(over_nodes(somewhere, ((number,) for number in range(9))))
        for name, spread in (("here", in_turn), ("there", over_nodes)):
            list(Conversion(source, Path(folder, name), config, spread=spread).run())
    digests = [hash_planes(load_model(ModelConfig(path=f"{folder}/{name}"))) for name in ("here", "there")]
    Path(folder, "found.json").write_text(json.dumps({"digests": digests, "jobs": jobs}))


@pytest.mark.slow
def test_a_conversion_spreads_over_the_nodes_of_a_running_cluster(tmp_path, llama_folder, cluster):
    """Each has one core."""
    (address,) = (option.partition("=")[2] for option in cluster[1][1].args if option.startswith("--address="))
    environment = os.environ | TOKEN | {"RAY_ADDRESS": address}
    converting = processes.Forked(convert_over_the_cluster, str(llama_folder), str(tmp_path), environment=environment)
    done = converting.wait()
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert [number for number, _ in found["jobs"]] == list(range(9)), "in their order"
    assert len({node for _, node in found["jobs"]}) > 1
    assert found["digests"][0] == found["digests"][1]


@pytest.mark.slow
def test_a_submitted_job_shrinks_with_its_cluster_and_grows_again(tmp_path, llama_folder, cluster):
    address, nodes, start_another = cluster
    settings = settings_of(run_dir := tmp_path / "run", llama_folder, placement="spread", environment=["A_SECRET"])
    settings["cluster"] |= {"workers": {"min": 1, "max": 3}, "resize_every_s": 3}
    settings["train"]["steps"] = 100_000
    process = submit(settings, tmp_path, address)
    processes.wait_for(run_dir, processes.logged("checkpoint"), process)
    start = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["event"] == "start"][-1]
    started = start["world_size"]  # Ray may begin before it has seen all nodes
    for worker in start["workers"]:
        assert psutil.Process(worker["pid"]).environ()["A_SECRET"] == "hunter2"
    kill_node(next(node for node in nodes[1:] if runs_a_worker(node)))
    processes.wait_for(run_dir, trains_on(lambda workers: workers < started), process)
    start_another()
    processes.wait_for(run_dir, trains_on(lambda workers: workers == 3), process)
    job = next(line.split()[1] for line in iter(process.stdout.readline, "") if line.startswith("job "))
    look = {verb: processes.mbdist("job", verb, job, "--address", address, environment=os.environ | TOKEN).wait()
            for verb in ("status", "logs", "stop")}  # fmt: skip
    assert look["status"].stdout == "RUNNING\n" and "converted 14 layers" in look["logs"].stdout
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "the same command goes on from there" in output, output[-3000:]
    assert not any(secret in output for secret in ("hunter2", TOKEN["RAY_AUTH_TOKEN"]))
    written = [run_dir / "config.yaml", run_dir / "metrics.jsonl", *(run_dir / "logs").iterdir()]
    assert len(written) > 3 and not any("hunter2" in file.read_text() for file in written)
    (lost, *_) = [record for record in read_metrics(run_dir / "metrics.jsonl") if record["event"] == "workers_lost"]
    assert "was lost: " in lost["error"] and len(lost["workers"]) >= 1


@pytest.mark.slow
def test_a_job_fails_with_its_exit_code_and_another_goes_on_beside_it(tmp_path, llama_folder, cluster):
    """Two groups of workers on one cluster, each with a port of its own."""
    other = settings_of(run_dir := tmp_path / "other", llama_folder, workers=1)
    other["train"]["steps"] = 100_000
    going_on = submit_by_hand(other, tmp_path, cluster[0])
    processes.wait_for(run_dir, processes.logged("step"), going_on)
    settings = settings_of(tmp_path / "run", llama_folder)
    settings["data"]["window"] = 4096
    output, _ = (process := submit(settings, tmp_path, cluster[0])).communicate(timeout=300)
    assert process.returncode == 2, output[-3000:]
    assert "longer than the model's context of 128 tokens" in output
    reached = list(read_metrics(run_dir / "metrics.jsonl"))[-1]
    processes.wait_for(run_dir, lambda records: records[-1]["step"] > reached["step"], going_on)
    (run_dir / "stop").touch()
    output, _ = going_on.communicate(timeout=120)
    assert "the same command goes on from there" in output, output[-3000:]
    assert len(sizes(read_metrics(run_dir / "metrics.jsonl"))) == 1, "it was never started again"


def test_a_dry_run_shows_and_refuses(tmp_path, llama_folder):
    settings = settings_of(tmp_path / "run", llama_folder, environment=["A_SECRET"])
    output, _ = submit(settings, tmp_path, "http://127.0.0.1:1", "--dry-run").communicate(timeout=60)
    for text in ("entry point: python -m mbdist.cli.main launch cluster run.yaml", "package: 0.0", "ray job submit"):
        assert text in output
    assert "A_SECRET" in output and "hunter2" not in output and not (tmp_path / "run").exists()
    (tmp_path / "big").mkdir()
    (tmp_path / "big/data.bin").write_bytes(bytes(2_000_000))
    options = ("--dry-run", "--working-dir", str(tmp_path / "big"), "--max-package-mb", "1")
    output, _ = (process := submit(settings, tmp_path, "http://127.0.0.1:1", *options)).communicate(timeout=60)
    assert process.returncode == 2 and "data.bin" in output and "2.0 MB" in output
    output, _ = submit(settings | {"run_dir": "relative"}, tmp_path, "http://127.0.0.1:1", "--dry-run").communicate()
    assert "must be an absolute path" in output
    settings["cluster"]["environment"] = ["RANK", "RAY_JOB_STOP_WAIT_TIME_S"]
    output, _ = submit(settings, tmp_path, "http://127.0.0.1:1", "--dry-run").communicate()
    assert "RANK, RAY_JOB_STOP_WAIT_TIME_S is set by the launcher" in output
