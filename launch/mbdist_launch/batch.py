"""A run as a batch job of SLURM. The scripts in ``slurm/`` do the work, and serve by hand too; here their ``#SBATCH``
lines are filled in."""

from __future__ import annotations

import functools
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Literal

from mbdist.config import RunConfig, write_config
from mbdist.errors import RunError, UserError


@dataclass(frozen=True)
class BatchJob:
    """A config on ``nodes`` machines of a SLURM cluster; ``cluster.workers`` are spread evenly over them."""

    config: RunConfig
    nodes: int
    kind: Literal["ray", "srun"]
    gpus_per_node: int = 0
    options: dict[str, str] = field(default_factory=dict)  # of sbatch, such as {"partition": "gpu"}

    def __post_init__(self) -> None:
        workers = self.config.cluster.most_workers
        if not Path(self.config.run_dir).is_absolute():
            raise UserError(
                f"run_dir = {self.config.run_dir}: it must be an absolute path, on storage that all nodes share"
            )
        if self.kind == "srun" and self.config.cluster.fewest_workers < workers:
            raise UserError(
                f"cluster.workers = {self.config.cluster.workers}: srun starts a fixed number; give one, or use "
                "--kind ray"
            )
        if self.kind == "srun" and workers % self.nodes:
            fits = [nodes for nodes in range(1, workers + 1) if workers % nodes == 0]
            raise UserError(
                f"cluster.workers = {workers} cannot be spread evenly over {self.nodes} nodes: --nodes can be "
                f"{', '.join(map(str, fits))}"
            )
        if self.gpus_per_node and self.gpus_per_node < self.workers_per_node:
            raise UserError(
                f"--gpus-per-node {self.gpus_per_node} is less than the {self.workers_per_node} workers of a node"
            )

    @property
    def workers_per_node(self) -> int:
        return math.ceil(self.config.cluster.most_workers / self.nodes)

    @functools.cached_property
    def folder(self) -> Path:
        """Of the script, its config, and the logs of all attempts: one a submission, since an earlier one's may be in
        use."""
        of_run = Path(self.config.run_dir) / "slurm"
        return of_run / f"submission_{1 + len(list(of_run.glob('submission_*')))}"

    def directives(self) -> dict[str, str]:
        """Options of sbatch; an empty value is a flag."""
        cpus = self.config.cluster.cpus_per_worker or 1
        tasks = 1 if self.kind == "ray" else self.workers_per_node
        return {
            "job-name": f"mbdist-{Path(self.config.run_dir).name}",
            "nodes": str(self.nodes),
            "ntasks-per-node": str(tasks),
            "cpus-per-task": str(cpus * self.workers_per_node // tasks),
            **({"gpus-per-node": str(self.gpus_per_node)} if self.gpus_per_node else {}),
            "output": str(self.folder / "job_%j.log"),
            "signal": "B:USR1@120",
            "requeue": "",
            "open-mode": "append",
            **self.options,
        }

    def script(self) -> str:
        template = (resources.files("mbdist_launch") / "slurm" / f"{self.kind}.sbatch").read_text()
        lines = [
            f"#SBATCH --{name}" + (f"={shlex.quote(value)}" if value else "")
            for name, value in self.directives().items()
        ]
        return re.sub(r"(?:^#SBATCH .*\n)+", lambda _: "\n".join(lines) + "\n", template, count=1, flags=re.MULTILINE)

    @property
    def command(self) -> list[str]:
        return ["sbatch", "--parsable", str(self.folder / f"{self.kind}.sbatch"), str(self.folder / "run.yaml")]

    def describe(self) -> str:
        return f"{self.script()}\n# submitted by: {shlex.join(self.command)}"

    def submit(self) -> str:
        """Write the script and its config into ``folder``; the id of the job. Raises RunError where SLURM refuses."""
        if shutil.which("sbatch") is None:
            raise UserError("there is no sbatch here: run this on a login node of the cluster, or use --dry-run")
        self.folder.mkdir(parents=True)
        (self.folder / f"{self.kind}.sbatch").write_text(self.script())
        write_config(self.config, self.folder / "run.yaml")
        done = subprocess.run(self.command, capture_output=True, text=True)
        if done.returncode:
            raise RunError(f"sbatch refused the job:\n{done.stderr.strip()}")
        return done.stdout.strip().partition(";")[0]
