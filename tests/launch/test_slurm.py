"""A real SLURM cluster of two nodes on this machine, with daemons of its own."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import models
import processes
import pytest
import yaml

from mbdist.config import parse_config
from mbdist.errors import UserError
from mbdist.model.hashing import hash_planes
from mbdist.model.loading import ModelConfig, load_model
from mbdist.train.metrics import read_metrics
from mbdist_launch import BatchJob

HERE = Path(__file__).parent
SCRIPTS = HERE.parents[1] / "launch/slurm"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCHED = os.environ["PATH"] + ":/usr/sbin:/sbin"  # where Debian has daemons


def run_job(run_dir, **cluster):
    settings = models.run_settings(
        run_dir, Path("/shared/models/llama"), cluster={"workers": 4, **cluster}, train={"micro_batch": 1}
    )
    settings["data"]["cache_dir"] = "/shared/cache"
    return parse_config(settings)


@pytest.mark.parametrize("kind", ["ray", "srun"])
def test_scripts_are_as_reviewed(kind):
    config = run_job(Path("/shared/runs/small"), cpus_per_worker=3)
    job = BatchJob(config, 2, kind, gpus_per_node=2, options={"partition": "gpu", "exclusive": ""})
    assert job.script() == (HERE / f"golden/{kind}.sbatch").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_scripts_have_no_known_mistakes():
    subprocess.run(["shellcheck", "-s", "bash", *SCRIPTS.glob("*.sbatch")], check=True)


def test_what_does_not_fit_is_refused():
    config = run_job(Path("/shared/runs/small"))
    with pytest.raises(UserError, match="--nodes can be 1, 2, 4"):
        BatchJob(config, 3, "srun")
    with pytest.raises(UserError, match="less than the 2 workers of a node"):
        BatchJob(config, 2, "ray", gpus_per_node=1)
    with pytest.raises(UserError, match="absolute path"):
        BatchJob(config.model_copy(update={"run_dir": "runs/small"}), 1, "ray")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which this cluster's commands work."""
    if missing := [name for name in NEEDED if shutil.which(name, path=SEARCHED) is None]:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host, user = socket.gethostname(), getpass.getuser()
    ports = sorted(processes.free_port() for _ in range(2))
    conf = {
        "ClusterName": "test",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": processes.free_port(),
        "SlurmUser": user,
        "SlurmdUser": user,
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits until credentials of its earlier attempt are void.
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool-%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd-%n.log",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "MpiDefault": "none",
        "ReturnToService": 2,
        "KillWait": 5,
        "SchedulerParameters": "batch_sched_delay=1,sched_interval=2",
    }
    nodes = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN"
    lines = [f"{name}={value}" for name, value in conf.items()]
    lines += [f"NodeName=n{i + 1} Port={port} {nodes}" for i, port in enumerate(ports)]
    lines += ["PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP"]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "state").mkdir()
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCHED}
    munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
    with contextlib.ExitStack() as daemons:
        for command in (["munged", *munge], ["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"n{i}"] for i in (1, 2))):
            output = daemons.enter_context((folder / f"{command[0]}{command[-1]}.out".replace("/", "_")).open("w"))
            daemon = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            daemons.callback(stop, daemon)
            if command[0] == "munged":
                until((folder / "munge.socket").exists, 30)
        until(lambda: command_output(environment, "sinfo", "-h", "-o", "%T %D").strip() == "idle 2", 60)
        yield environment


def stop(daemon):
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.2)


def command_output(environment, *command):
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout


def submit(slurm, folder, settings, kind):
    """The job's id."""
    path = folder / f"{Path(settings['run_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = processes.mbdist("launch", "slurm", path, "--nodes", 2, "--kind", kind, environment=slurm).wait()
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(":")


def ended(slurm, job, seconds=400):
    """(state, exit code) of the job when it is over."""
    deadline = time.monotonic() + seconds
    while True:
        shown = command_output(slurm, "scontrol", "show", "job", job)
        fields = dict(field.partition("=")[::2] for field in shown.split())
        if fields.get("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
            return fields["JobState"], fields["ExitCode"].partition(":")[0]
        if time.monotonic() > deadline:
            subprocess.run(["scancel", job], env=slurm)
            raise AssertionError(f"the job did not end: {shown}")
        time.sleep(0.5)


def logs_of(settings):
    files = sorted((Path(settings["run_dir"]) / "slurm").rglob("*.log"))
    return "\n".join(f"== {file}\n{file.read_text()[-2000:]}" for file in files)


def settings_of(tmp_path, llama_folder, name, steps=12):
    return models.run_settings(
        tmp_path / name,
        llama_folder,
        cluster={"workers": 2, "zero_stage": 2, "cpus_per_worker": 1},
        data={"max_eval_windows": 2},
        train={"steps": steps},
    )


def events(settings, event):
    metrics = Path(settings["run_dir"]) / "metrics.jsonl"
    return [record for record in read_metrics(metrics) if record["event"] == event] if metrics.exists() else []


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory, llama_folder):
    """Digest of the planes of a run of two workers, without SLURM."""
    settings = settings_of(tmp_path_factory.mktemp("undisturbed"), llama_folder, "run")
    processes.train(settings)
    return hash_planes(load_model(ModelConfig(path=f"{settings['run_dir']}/model")))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["srun", "ray"])
def test_a_preempted_job_saves_and_goes_on(tmp_path, llama_folder, slurm, undisturbed, kind):
    settings = settings_of(tmp_path, llama_folder, kind)
    job = submit(slurm, tmp_path, settings, kind)
    until(lambda: len(events(settings, "step")) >= 2 or "FAILED" in command_output(slurm, "squeue", "-j", job), 300)
    subprocess.run(["scancel", "--batch", "--signal", "USR1", job], env=slurm, check=True)
    assert ended(slurm, job) == ("COMPLETED", "0"), logs_of(settings)
    assert len(events(settings, "resumed")) == 1, logs_of(settings)
    assert [start["world_size"] for start in events(settings, "start")] == [2, 2]
    attempts = sorted(path.name for path in (tmp_path / kind / "slurm").glob("submission_1/job_*/attempt_*"))
    assert attempts == ["attempt_0", "attempt_1"]
    assert hash_planes(load_model(ModelConfig(path=f"{settings['run_dir']}/model"))) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["srun", "ray"])
def test_a_failing_worker_ends_the_job_with_its_exit_code(tmp_path, llama_folder, slurm, kind):
    settings = settings_of(tmp_path, llama_folder, kind)
    settings["data"]["window"] = 4096
    job = submit(slurm, tmp_path, settings, kind)
    assert ended(slurm, job) == ("FAILED", "2"), logs_of(settings)
    assert "data.window = 4096 is longer than the model's context" in logs_of(settings)
