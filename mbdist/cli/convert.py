from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbdist.cli.options import GgufFile, ModelPath, PythonDocs, TextFiles, TrustRemoteCode, check_choice, text_source
from mbdist.config.convert import ConvertConfig, ReconstructionConfig
from mbdist.config.data import DataConfig
from mbdist.config.model import ModelConfig
from mbdist.errors import UserError

if TYPE_CHECKING:
    from mbdist.convert.initialize import Spread

_DEFAULTS = ConvertConfig()


def convert(
    model: ModelPath,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Folder to write.")],
    planes: Annotated[
        int | None, typer.Option(min=1, max=8, help=f"K: sign planes of every matrix ({_DEFAULTS.planes}).")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(min=1, help="Average bits a weight with scales, instead of --planes.")
    ] = None,
    max_planes: Annotated[int, typer.Option(min=1, max=8, help="With --bits: most planes of a matrix.")] = (
        _DEFAULTS.max_planes
    ),
    allocation: Annotated[
        str, typer.Option(help="With --bits: second_order (needs text) or residual.")
    ] = _DEFAULTS.allocation,
    init: Annotated[str, typer.Option(help="How planes are found: calibrated, joint or svid.")] = _DEFAULTS.init,
    include: Annotated[list[str] | None, typer.Option(help="Layers to convert, shell pattern; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Layers to leave float; repeatable.")] = None,
    text: TextFiles = None,
    python_docs: PythonDocs = False,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = (
        _DEFAULTS.calibration_tokens
    ),
    sequential: Annotated[
        bool, typer.Option(help="X^T X of later blocks is that of what the converted earlier ones put out.")
    ] = _DEFAULTS.sequential,
    reconstruction_steps: Annotated[
        int, typer.Option(min=0, help="With calibrated: steps in which a block's bits learn its outputs.")
    ] = _DEFAULTS.reconstruction.steps,
    window: Annotated[int, typer.Option(min=8, help="Tokens a calibration window.")] = 512,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Ray tasks at a time, here or at RAY_ADDRESS, for matrices and their rows."),
    ] = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Turn a float model into a multi-Boolean one, block by block: the model is never in memory as a whole.

    Killed, it leaves what is done beside OUTPUT, and the same command goes on from there.

    Example: `mbdist convert path/or/hub-id out/2bit --planes 2 --python-docs`
    Example: `mbdist convert path/or/hub-id out/2.5bit --bits 2.5 --text corpus.txt`
    """
    check_choice("--init", init, ("calibrated", "joint", "svid"))
    check_choice("--allocation", allocation, ("second_order", "residual"))
    if planes is not None and bits is not None:
        raise UserError("--planes and --bits exclude each other: name one")
    if text and python_docs:
        raise UserError("--text and --python-docs exclude each other: name one")
    source = ModelConfig(path=model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    settings = ConvertConfig(
        planes=planes or _DEFAULTS.planes,
        bits=bits,
        max_planes=max_planes,
        allocation=allocation,
        init=init,
        include=include or ["*"],
        exclude=exclude or [],
        calibration_tokens=calibration_tokens,
        sequential=sequential,
        reconstruction=ReconstructionConfig(steps=reconstruction_steps),
    )
    if settings.needs_calibration != (bool(text) != python_docs):
        if not settings.needs_calibration:
            raise UserError(f"--text and --python-docs are for calibration; --init {init} takes none here")
        what, instead = "--bits with --allocation second_order", "--allocation residual takes none"
        if init == "calibrated":
            what, instead = "--init calibrated", "--init joint takes none, for a start that is worse by far"
        raise UserError(f"{what} takes text to calibrate on: name it with --text FILE, or --python-docs ({instead})")
    data = None
    if settings.needs_calibration:
        data = DataConfig(train=text_source(text), window=window)
    _convert(source, settings, data, output, workers)


def _convert(
    source: ModelConfig, settings: ConvertConfig, data: DataConfig | None, output: Path, workers: int | None
) -> None:
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from mbdist.convert import Conversion, bits_per_weight
    from mbdist.data.calibration import calibration_batches
    from mbdist.data.windows import load_windows
    from mbdist.model.loading import check_window, is_multi_boolean, load_model_config, load_tokenizer
    from mbdist.train.environment import compute_dtype

    if is_multi_boolean(source):
        raise UserError(f"{source.path} is multi-Boolean already")
    console = Console()
    with _spread(workers) as spread:
        conversion = Conversion(source, output, settings, compute_dtype("auto", torch.device("cpu")), spread)
        if conversion.loads_whole:
            console.print(f"{source.path} is not in safetensors files: it is loaded whole once, and rewritten as such")
        tokenizer = load_tokenizer(source)
        calibration = []
        if data is not None:
            check_window(data.window, load_model_config(source), "--window")
            windows = load_windows(data.train, data, tokenizer)
            calibration = calibration_batches(windows, settings.calibration_tokens)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        reports = []
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("reading", total=len(conversion.layers))
            for report in conversion.run(calibration, tokenizer):
                reports.append(report)
                description = f"{report.name}: relative error {report.relative_error:.4f}"
                progress.update(task, advance=1, description=description)
    reconstructed = any(report.output_error is not None for report in reports)
    table = Table("layer", "out x in", "planes", "relative error", *(["error of its block's outputs"] * reconstructed))
    for report in reports:
        table.add_row(
            report.name,
            f"{report.shape[0]} x {report.shape[1]}",
            str(report.planes),
            f"{report.relative_error:.4f}",
            *([f"{report.output_error:.4f}" if report.output_error is not None else ""] * reconstructed),
        )
    console.print(table)
    size = sum(file.stat().st_size for file in output.glob("*.safetensors"))  # what stays float included
    mean = sum(report.relative_error for report in reports) / len(reports)
    console.print(
        f"{len(reports)} layers, {bits_per_weight(reports):.3f} bits a weight (scales included), "
        f"mean relative error {mean:.4f}; all parameters {size / 2**20:,.0f} MiB; written to {output}"
    )


def _spread(workers: int | None) -> contextlib.AbstractContextManager[Spread]:
    if workers is None:
        from mbdist.convert.initialize import in_turn

        return contextlib.nullcontext(in_turn)
    from mbdist_launch.spread import spread_over  # imports Ray, which other conversions do without

    return spread_over(workers)
