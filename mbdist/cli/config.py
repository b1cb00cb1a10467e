from __future__ import annotations

import typer

from mbdist.cli.options import Overrides, RunFile

app = typer.Typer(help="Check run configs and document their settings.", no_args_is_help=True)


@app.command()
def schema() -> None:
    """Print the JSON schema of a run config, every setting documented.

    Example: `mbdist config schema > run.schema.json`
    """
    import json

    from mbdist.config import RunConfig

    print(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def check(run: RunFile, overrides: Overrides = None) -> None:
    """Validate a config without running it, and print it with every default spelled out.

    Example: `mbdist config check configs/quickstart.yaml train.steps=20`
    """
    import yaml

    from mbdist.config import load_config

    config = load_config(run, overrides or [])
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
