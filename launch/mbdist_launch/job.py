"""A run as a job of a Ray cluster, through Ray's Jobs API: what ``ray job submit`` does, from a validated config."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mbdist.config import RunConfig, write_config
from mbdist.errors import RunError, UserError

_ENTRYPOINT = "python -m mbdist.cli.main launch cluster run.yaml"
_NOT_SHIPPED = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "*.egg-info", ".*_cache")
_STOP_S = 600  # between being told to stop and being killed: a checkpoint may be large
_POLL_S = 1.0
_SILENCE_S = 300  # of the job server, after which nobody waits for it


@dataclass(frozen=True)
class Job:
    """What is submitted. Values of environment variables are looked up at the last moment, and never shown."""

    config: RunConfig
    working_dir: Path | None  # shipped to the cluster with the config; None: the config alone
    max_package_mb: float = 100

    def __post_init__(self) -> None:
        if not Path(self.config.run_dir).is_absolute():
            raise UserError(
                f"run_dir = {self.config.run_dir}: it must be an absolute path for a cluster, on storage that all "
                "nodes share"
            )
        if absent := [name for name in self.config.cluster.environment if name not in os.environ]:
            raise UserError(f"cluster.environment names variables that are not set here: {', '.join(absent)}")

    @contextlib.contextmanager
    def package(self) -> Iterator[Path]:
        """A folder with ``run.yaml`` and what else is shipped. Raises UserError where that is too much."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "package"
            if self.working_dir is None:
                folder.mkdir()
            else:
                shutil.copytree(self.working_dir, folder, ignore=_NOT_SHIPPED, ignore_dangling_symlinks=True)
            write_config(self.config, folder / "run.yaml")
            sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
            if sum(sizes.values()) > self.max_package_mb * 1e6:
                largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
                named = "\n  ".join(f"{sizes[file] / 1e6:8.1f} MB  {file.relative_to(folder)}" for file in largest)
                raise UserError(
                    f"{self.working_dir} is a package of {sum(sizes.values()) / 1e6:.1f} MB, more than the "
                    f"{self.max_package_mb:g} MB of --max-package-mb. The largest files:\n  {named}\n"
                    "Name another --working-dir; data belongs on storage that all nodes share"
                )
            yield folder

    def runtime_env(self, package: Path, hidden: bool = False) -> dict:
        """As Ray takes it; ``hidden``: for showing."""
        forwarded = {name: "***" if hidden else os.environ[name] for name in self.config.cluster.environment}
        return {"working_dir": str(package), "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S), **forwarded}}

    def describe(self, address: str) -> str:
        """What would be submitted, and the command that does the same by hand."""
        with self.package() as package:
            size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
            shown = self.runtime_env(package, hidden=True) | {
                "working_dir": str(self.working_dir or "the config alone")
            }
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}
        pairs = [f'"{name}": "{value}"' for name, value in variables.items()]
        pairs += [f'"{name}": "\'"${name}"\'"' for name in self.config.cluster.environment]
        by_hand = (
            f"ray job submit --address {shlex.quote(address)} --working-dir FOLDER_WITH_run.yaml "
            f"--runtime-env-json '{{\"env_vars\": {{{', '.join(pairs)}}}}}' -- {_ENTRYPOINT}"
        )
        return (
            f"entry point: {_ENTRYPOINT}\nruntime environment: {json.dumps(shown)}\n"
            f"package: {size / 1e6:.3f} MB\nthe same by hand: {by_hand}"
        )


def _use_token_if_any() -> None:
    """Clusters started where a token is want one; Ray's own commands look for it, its Python client does not. Ray reads
    the mode when it is imported."""
    has_token = {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys() or (
        Path.home() / ".ray/auth_token"
    ).exists()
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")


class JobServer:
    """The job server of a cluster, as soon as it answers."""

    def __init__(self, address: str, patience_s: float = 120):
        _use_token_if_any()
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        headers = json.loads(os.environ.get("RAY_JOB_HEADERS", "null"))
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self._client = JobSubmissionClient(address, headers=headers)
                return
            except AuthenticationError as error:
                raise UserError(f"the Ray cluster at {address} refuses: {error}") from error
            except (ConnectionError, RuntimeError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"no Ray job server answers at {address} after {patience_s:g} s: {error}"
                    ) from error
                time.sleep(_POLL_S)

    def submit(self, job: Job) -> str:
        """The job's id."""
        with job.package() as package:
            return self._client.submit_job(
                entrypoint=_ENTRYPOINT,
                runtime_env=job.runtime_env(package),
                metadata={"mbdist_run_dir": job.config.run_dir},
            )

    def follow(self, job_id: str) -> int:
        """Print the job's log until it ends; its exit code. A connection that is lost is made again.

        Raises RunError where the job server stays away.
        """
        from aiohttp import ClientError

        printed = 0  # characters: every connection tells the log from its begin
        silent_since = None

        async def stream() -> None:
            nonlocal printed
            reached = 0
            async for lines in self._client.tail_job_logs(job_id):
                print(lines[max(0, printed - reached) :], end="", flush=True)
                reached += len(lines)
                printed = max(printed, reached)

        while True:
            try:
                ended = self._client.get_job_status(job_id).is_terminal()  # if so, what is told now is all of the log
                asyncio.run(stream())
                silent_since = None
                if ended:
                    break
            except (ClientError, OSError, RuntimeError) as error:
                silent_since = silent_since or time.monotonic()
                if time.monotonic() > silent_since + _SILENCE_S:
                    raise RunError(
                        f"the job server does not tell the job's log any more: {error}. The job {job_id} may go "
                        "on: see mbdist job status"
                    ) from error
            time.sleep(_POLL_S)
        found = self._client.get_job_info(job_id)
        if found.driver_exit_code is not None:
            return found.driver_exit_code
        if found.status == "STOPPED":
            return os.EX_TEMPFAIL  # it has saved, as `mbdist job stop` told it
        if found.status != "SUCCEEDED":
            print(f"the job {job_id} ended as {found.status}: {found.message}")
        return 0 if found.status == "SUCCEEDED" else 1

    def status(self, job_id: str) -> str:
        return str(self._job(job_id).status)

    def logs(self, job_id: str) -> str:
        self._job(job_id)
        return self._client.get_job_logs(job_id)

    def stop(self, job_id: str) -> None:
        """Have the run save its state and end."""
        self._job(job_id)
        self._client.stop_job(job_id)

    def _job(self, job_id: str):
        try:
            return self._client.get_job_info(job_id)
        except RuntimeError as error:
            raise UserError(f"the cluster knows no job {job_id}: {error}") from error
