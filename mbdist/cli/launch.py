from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from mbdist.cli.options import Overrides, RunFile

app = typer.Typer(help="Start the workers of a run.", no_args_is_help=True)
job_app = typer.Typer(help="Look after a job that `mbdist launch ray` submitted.", no_args_is_help=True)

Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Job server of the cluster, such as http://head:8265.")
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="As `mbdist launch ray` printed it.")]


class Kind(enum.StrEnum):
    RAY = "ray"
    SRUN = "srun"


@app.callback()
def _group() -> None:
    """Start the workers of a run."""


@app.command()
def local(run: RunFile, overrides: Overrides = None) -> None:
    """Run a config on this machine with workers that Ray starts.

    Example: `mbdist launch local configs/quickstart.yaml train.steps=20`
    """
    from mbdist.config import load_config
    from mbdist_launch import launch_local

    config = load_config(run, overrides or [])
    print_summary(launch_local(config), config.run_dir)


@app.command()
def cluster(
    run: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Wait until the cluster has so many.")] = 1,
) -> None:
    """Run a config on the Ray cluster that this machine is a part of, or that RAY_ADDRESS names: what a submitted job
    does.

    Example: `ray job submit --address http://head:8265 --working-dir . -- mbdist launch cluster run.yaml`
    """
    from mbdist.config import load_config
    from mbdist_launch import launch_on_cluster

    config = load_config(run, overrides or [])
    print_summary(launch_on_cluster(config, nodes), config.run_dir)


@app.command()
def ray(
    run: RunFile,
    address: Address,
    overrides: Overrides = None,
    working_dir: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder to ship to the cluster. Default: the config alone."),
    ] = None,
    max_package_mb: Annotated[float, typer.Option(help="Refuse to ship more than this.")] = 100,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id and leave it to itself.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted.")] = False,
) -> None:
    """Submit a config as a job of a Ray cluster, show its log and end with its exit code.

    The nodes need mbdist installed; run_dir must be an absolute path on storage that they share.

    Example: `mbdist launch ray run.yaml --address http://head:8265`
    """
    from mbdist.config import load_config
    from mbdist_launch import Job, JobServer

    job = Job(load_config(run, overrides or []), working_dir, max_package_mb)
    print(job.describe(address))
    if dry_run:
        return
    server = JobServer(address)
    job_id = server.submit(job)
    print(f"job {job_id} (mbdist job logs|status|stop {job_id} --address {address})", flush=True)
    if not detach:
        raise typer.Exit(server.follow(job_id))


@app.command()
def slurm(
    run: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    kind: Annotated[
        Kind, typer.Option(help="`ray`: a Ray cluster on the allocation, which replaces lost workers. `srun`: no Ray.")
    ] = Kind.RAY,
    gpus_per_node: Annotated[int, typer.Option(min=0)] = 0,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Of sbatch, such as partition=gpu; repeatable.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script.")] = False,
) -> None:
    """Submit a config as a SLURM job, which saves before it is preempted and goes on when it runs again.

    The script, its config and the logs are in `run_dir/slurm/submission_N`; run_dir must be on storage that all nodes
    share. The environment that submits must have mbdist on its PATH, and so must the nodes.

    Example: `mbdist launch slurm run.yaml --nodes 4 --gpus-per-node 8 --option partition=gpu --option time=24:00:00`
    """
    from mbdist.config import load_config
    from mbdist_launch import BatchJob

    options = dict(each.lstrip("-").partition("=")[::2] for each in option or [])
    job = BatchJob(load_config(run, overrides or []), nodes, kind.value, gpus_per_node, options)
    if dry_run:
        print(job.describe())
        return
    job_id = job.submit()
    print(f"job {job_id}: script and logs in {job.folder}; scancel --batch --signal=USR1 {job_id} saves and requeues")


@job_app.command()
def status(job: JobId, address: Address) -> None:
    """Whether the job runs, and how it ended."""
    from mbdist_launch import JobServer

    print(JobServer(address, patience_s=10).status(job))


@job_app.command()
def logs(job: JobId, address: Address) -> None:
    """What the job has printed so far."""
    from mbdist_launch import JobServer

    print(JobServer(address, patience_s=10).logs(job), end="")


@job_app.command()
def stop(job: JobId, address: Address) -> None:
    """Have the run save its state and end; submitted again, it goes on from there."""
    from mbdist_launch import JobServer

    JobServer(address, patience_s=10).stop(job)


def print_summary(summary: dict, run_dir: str) -> None:
    """The end of a run, for a reader."""
    planes = " or ".join(map(str, summary["planes"]))
    print(f"\n{summary['model']}: {planes} planes, {summary['bits_per_weight']} bits a weight")
    for name, value in summary["perplexity"].items():
        print(f"  perplexity {name:>10}: {value:,.2f}")
    print("  planes reloaded in a new process: bit-identical")
    if summary["generated"]:
        print(f"  generated: {summary['generated']!r}")
    print(f"  {summary['wall_s']:.0f} s; summary in {run_dir}/summary.json, model in {run_dir}/model")
