from __future__ import annotations

import typer

from mbdist.cli.options import Overrides, RunFile

app = typer.Typer(help="Start the workers of a run.", no_args_is_help=True)


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


def print_summary(summary: dict, run_dir: str) -> None:
    """The end of a run, for a reader."""
    print(f"\n{summary['model']}: {summary['planes']} planes, {summary['bits_per_weight']} bits a weight")
    for name, value in summary["perplexity"].items():
        print(f"  perplexity {name:>10}: {value:,.2f}")
    print("  planes reloaded in a new process: bit-identical")
    if summary["generated"]:
        print(f"  generated: {summary['generated']!r}")
    print(f"  {summary['wall_s']:.0f} s; summary in {run_dir}/summary.json, model in {run_dir}/model")
