"""The ``mbdist`` command. A verb a file; heavy imports happen inside the verbs, so that help and checks are quick."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import typer

from mbdist.cli import bench, config, convert, env, evaluate, generate, launch, plan, status, teacher, train, tune
from mbdist.errors import Interrupted, RunError, UserError
from mbdist.train.ending import end_process
from mbdist.train.stop_signals import remember_preemption

_USERS_TO_MEND = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

app = typer.Typer(
    name="mbdist",
    help="Distributed finetuning of multi-Boolean (1 to 4 bit) language models, natively in the Boolean domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("convert")(convert.convert)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("plan")(plan.plan)
app.command("status")(status.status)
app.command("tune")(tune.tune)
app.command("env")(env.env)
app.add_typer(launch.app, name="launch")
app.add_typer(launch.job_app, name="job")
app.add_typer(teacher.app, name="teacher")
app.add_typer(config.app, name="config")
app.add_typer(bench.app, name="bench")


def _exit(code: int) -> None:
    if "RANK" in os.environ:  # a worker, whose launcher reads the code
        end_process(code)
    sys.exit(code)


def main() -> None:
    """Entry point: a mistake of the user's is one message and exit code 2, a failed run one message and exit code 1."""
    # transformers imports DeepSpeed where it is installed; without a GPU its search for one prints a warning.
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    remember_preemption()
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(2)
    except OSError as error:  # a full disk or a forbidden folder, wherever it strikes
        if error.errno not in _USERS_TO_MEND:
            raise
        print(f"error: {error}", file=sys.stderr)
        _exit(2)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        _exit(1)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        _exit(os.EX_TEMPFAIL)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit(130)


if __name__ == "__main__":
    main()
