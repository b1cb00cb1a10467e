from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbdist.cli.options import Overrides, RunFile
from mbdist.errors import UserError

app = typer.Typer(help="What a run distils from.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """What a run distils from."""


@app.command()
def cache(
    run: RunFile,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder, instead of the config's loss.cache.path.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine that share the work.")] = 1,
) -> None:
    """Write the most likely tokens of a run's teacher to disk, for every training window: `loss.teacher: cached` then
    needs no teacher in memory.

    Run again, it goes on where it was interrupted. Across machines, start it with torchrun or srun on storage that
    they share. A teacher that fits on no worker: `loss.teacher_placement=sharded`.

    Example: `mbdist teacher cache run.yaml -o caches/wikitext --workers 8`
    """
    import os
    import sys

    from mbdist.config import load_config

    config = load_config(run, overrides or [])
    if workers > 1 and "RANK" not in os.environ:
        arguments = [run, *(overrides or []), *(["-o", str(output)] if output is not None else [])]
        command = [sys.executable, "-m", "mbdist.cli.main", "teacher", "cache", *arguments]
        raise typer.Exit(_run_here(command, workers))
    if output is not None:
        path = config.loss.cache.model_copy(update={"path": str(output)})
        config = config.model_copy(update={"loss": config.loss.model_copy(update={"cache": path})})
    config = config.at_size(int(os.environ.get("WORLD_SIZE", "1")))
    from mbdist.train.ending import end_process
    from mbdist.train.environment import leave_group, pin_accelerator, set_up_worker

    started_by_launcher = "RANK" in os.environ  # later every worker has it
    pin_accelerator(config)
    from mbdist.comm.communicator import Communicator
    from mbdist.train.cache_writer import write_cache
    from mbdist.train.teacher_cache import bytes_a_token, cache_folder

    device = set_up_worker(config)
    communicator = Communicator(config.comm.timeout_s)
    try:
        header = write_cache(config, communicator, device)
    except UserError:
        if communicator.rank:
            end_process(2)  # the first worker says it
        raise
    if communicator.rank == 0:
        a_token = bytes_a_token(header.top_k, header.vocabulary)
        size = header.num_windows * (header.window - 1) * a_token
        print(
            f"{header.num_windows:,} windows of {header.window} tokens, the {header.top_k} most likely of each: "
            f"{size / 2**20:,.0f} MiB, {a_token} bytes a token, in {cache_folder(config)}\n"
            f"held-out perplexity of the teacher: {header.held_out['perplexity']:,.2f}\n"
            f"train with loss.teacher=cached loss.cache.path={cache_folder(config)}"
        )
    leave_group()
    if started_by_launcher:
        end_process()


def _run_here(command: list[str], workers: int) -> int:
    """Run a command as that many workers on this machine; the exit code of the first that fails, which ends all."""
    import os
    import socket
    import subprocess
    import time

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    try:
        for rank in range(workers):
            place = {key: str(value) for key, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
            running.append(subprocess.Popen(command, env=os.environ | place))
        codes = [worker.poll() for worker in running]
        while None in codes and not any(codes):
            time.sleep(0.2)
            codes = [worker.poll() for worker in running]
        return next((code for code in codes if code), 0)
    finally:
        for worker in running:
            worker.terminate()
            worker.wait()
