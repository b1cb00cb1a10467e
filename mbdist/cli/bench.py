from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from mbdist.cli.options import Overrides, check_choice, check_folder
from mbdist.errors import UserError

app = typer.Typer(
    help="Measure; every result is a ratio against a named baseline of the same run.", no_args_is_help=True
)


@app.callback()
def _group() -> None:
    """Measure; every result is a ratio against a named baseline of the same run."""


@app.command()
def train(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config whose model, data, batch and loss are used.")] = (
        "configs/quickstart.yaml"
    ),
    steps: Annotated[int, typer.Option(min=2, help="Timed steps of each kind.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """A Boolean finetuning step against the same model's dense bf16 step (DeepSpeed AdamW, same batch, same loss).

    Example: `mbdist bench train --steps 5 --json train.json`
    """
    from mbdist.bench.train import bench_train
    from mbdist.config import load_config

    check_folder(json_file)
    bench_train(load_config(config, overrides or []), steps, json_file)


@app.command()
def quality(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config: model, texts, tokens and all settings that rows share.")] = (
        "configs/quality.yaml"
    ),
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="start, finetuned, adapted, allocation, architecture, conversion, ablation; repeatable. Default: all."
        ),
    ] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Results; rows that stand there are kept.")] = Path(
        "docs/benchmarks/quality.json"
    ),
) -> None:
    """Perplexity against bits before and after finetuning, beside GPTQ, straight-through latents and the paper.

    Example: `mbdist bench quality data.train.paths=[valid.txt] data.eval.paths=[test.txt] --group start`
    """
    from mbdist.bench.quality import GROUPS, bench_quality
    from mbdist.bench.quality_report import write_report
    from mbdist.config import load_config

    for name in group or []:
        check_choice("--group", name, GROUPS)
    check_folder(json_file)
    bench_quality(load_config(config, overrides or []), group or list(GROUPS), json_file)
    write_report(json_file)


@app.command()
def comm(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config whose model, data and codec are used.")] = "configs/comm.yaml",
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="Repeatable. Default: 2 4.")] = None,
    stage: Annotated[list[int] | None, typer.Option(min=1, max=3, help="ZeRO; repeatable. Default: 2 3.")] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: all.")] = None,
    mbit: Annotated[
        list[int] | None, typer.Option(min=0, help="Rates of the links; 0: no limit. Default: 0 1000 100 10.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Bytes with embeddings and head trained on both sides too.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """Bytes and seconds of a step on slow links against DeepSpeed's dense bf16 step. Needs root (network namespaces).

    Example: `mbdist bench comm --ranks 2 --stage 2 --codec sign --mbit 100`
    """
    from mbdist.bench.comm import bench_comm
    from mbdist.comm.codecs import CODECS
    from mbdist.config import load_config

    check_folder(json_file)
    for name in codec or []:
        check_choice("--codec", name, CODECS)
    loaded = load_config(config, overrides or [])
    rates = mbit or [0, 1000, 100, 10]
    bench_comm(loaded, ranks or [2, 4], stage or [2, 3], codec or list(CODECS), rates, json_file, everything)


@app.command()
def scaling(
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="Repeatable. Default: 8 16 64 256 1024.")] = None,
    codec: Annotated[str, typer.Option(help="Of the signal.")] = "sign",
    planes: Annotated[int, typer.Option(min=1, help="K.")] = 2,
    node_size: Annotated[int, typer.Option(min=1, help="Workers on a machine, for the hierarchical rows.")] = 8,
) -> None:
    """Bytes that a rank of a 70B LLaMA sends in a step, on paper, flat and by machines, beside dense bf16.

    Example: `mbdist bench scaling --ranks 64 --ranks 1024`
    """
    from mbdist.bench.scaling import scaling_table
    from mbdist.comm.codecs import CODECS

    check_choice("--codec", codec, CODECS)
    counts = ranks or [8, 16, 64, 256, 1024]
    uneven = [count for count in counts if count % node_size]
    if uneven:
        raise UserError(f"--ranks {uneven[0]} is no multiple of --node-size {node_size}")
    scaling_table(counts, codec, planes, node_size)


@app.command()
def codecs(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config: data, tokens, optimizers.")] = "configs/codecs.yaml",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here too.")] = None,
) -> None:
    """Loss at equal tokens with the signal in 32, 16, 8, 4 and 1 bits a weight.

    Example: `mbdist bench codecs --json codecs.json`
    """
    from mbdist.bench.codecs import bench_codecs
    from mbdist.config import load_config

    check_folder(json_file)
    bench_codecs(load_config(config, overrides or []), json_file)


@app.command()
def teachers(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config: data, tokens, optimizers.")] = "configs/codecs.yaml",
    top_k: Annotated[list[int] | None, typer.Option(min=1, help="Repeatable. Default: 8 32 128.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Of the runs whose memory and time are measured; 1: none.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write both tables here too.")] = None,
) -> None:
    """Loss at equal tokens from a whole teacher and from its k most likely tokens; memory and time of every kind.

    Example: `mbdist bench teachers loss.kl_weight=1 loss.cross_entropy_weight=0 --json teachers.json`
    """
    from mbdist.bench.teachers import bench_teachers
    from mbdist.config import load_config

    check_folder(json_file)
    bench_teachers(load_config(config, overrides or []), top_k or [8, 32, 128], ranks, json_file)


@app.command()
def faults(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config; its model is replaced by a small one of its kind.")] = (
        "configs/faults.yaml"
    ),
    kills: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option(help="Of the moments and the workers that are killed.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """Workers of a run are killed at random moments: does it end with the bits of an undisturbed one, and how soon does
    it go on?

    Example: `mbdist bench faults --kills 20 --json docs/benchmarks/faults.json`
    """
    from mbdist.bench.faults import bench_faults
    from mbdist.config import load_config

    check_folder(json_file)
    bench_faults(load_config(config, overrides or []), kills, seed, json_file)


@app.command()
def start(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config whose tokenizer, data and optimizers are used.")] = (
        "configs/comm.yaml"
    ),
    shape: Annotated[str, typer.Option(help="Of the LLaMA: 10m, 300m, 700m, 1b, 3b, 7b, 13b.")] = "7b",
    planes: Annotated[int, typer.Option(min=1, max=8, help="K.")] = 2,
    ranks: Annotated[int, typer.Option(min=1)] = 2,
    steps: Annotated[int, typer.Option(min=0, help="Steps to take after the start.")] = 0,
    dense: Annotated[bool, typer.Option("--dense", help="DeepSpeed's bf16 and AdamW instead, as a baseline.")] = False,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the model, which has K bits a weight.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """Memory of CPU ranks while a run starts under ZeRO-3 against what they hold then, on a model of random bits.

    Example: `mbdist bench start --shape 7b --json docs/benchmarks/start.json`
    """
    from mbdist.bench.llama_shapes import SHAPES
    from mbdist.bench.start import bench_start
    from mbdist.config import load_config

    check_folder(json_file)
    check_choice("--shape", shape, SHAPES)
    bench_start(load_config(config, overrides or []), shape, planes, ranks, steps, dense, scratch, json_file)


@app.command()
def convert(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config whose tokenizer and text are used.")] = "configs/comm.yaml",
    shape: Annotated[str, typer.Option(help="Width of the LLaMA: 10m, 300m, 700m, 1b, 3b, 7b, 13b.")] = "7b",
    layers: Annotated[int, typer.Option(min=1, help="Instead of the shape's.")] = 2,
    planes: Annotated[int, typer.Option(min=1, max=8, help="K.")] = 2,
    init: Annotated[str, typer.Option(help="svid, joint or calibrated.")] = "joint",
    scratch: Annotated[Path | None, typer.Option(help="Folder for the float model and what it becomes.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """Memory of a conversion above what the interpreter and its libraries hold, on a model of random weights.

    Example: `mbdist bench convert --shape 7b --layers 4 --init svid --planes 1 --json convert.json`
    """
    from mbdist.bench.convert import bench_convert
    from mbdist.bench.llama_shapes import SHAPES
    from mbdist.config import load_config
    from mbdist.config.convert import ConvertConfig

    check_folder(json_file)
    check_choice("--shape", shape, SHAPES)
    check_choice("--init", init, ("svid", "joint", "calibrated"))
    loaded = load_config(config, overrides or [])
    settings = loaded.convert.model_dump() | {"planes": planes, "bits": None, "init": init}
    bench_convert(loaded, shape, layers, ConvertConfig.model_validate(settings), scratch, json_file)


@app.command()
def checkpoint(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config; its model is replaced by a small one of its kind.")] = (
        "configs/checkpoint.yaml"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """How much longer a step takes while a checkpoint is written in the background.

    Example: `mbdist bench checkpoint --json docs/benchmarks/checkpoint.json`
    """
    from mbdist.bench.checkpoint import bench_checkpoint
    from mbdist.config import load_config

    check_folder(json_file)
    bench_checkpoint(load_config(config, overrides or []), json_file)


@app.command()
def levers(
    overrides: Overrides = None,
    config: Annotated[str, typer.Option(help="Run config; its model is replaced by a small one of its kind.")] = (
        "configs/levers.yaml"
    ),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here too.")] = None,
) -> None:
    """What every setting that saves memory saves and costs, one at a time, beside what the plan predicted.

    Example: `mbdist bench levers --json docs/benchmarks/levers.json`
    """
    from mbdist.bench.levers import bench_levers
    from mbdist.config import load_config

    check_folder(json_file)
    bench_levers(load_config(config, overrides or []), json_file)


@app.command()
def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="13b, 70b (all matrices of a block), OUTxIN, or OUT+OUTxIN for matrices on one input; repeatable. "
            "Default: 13b, on a GPU 70b too."
        ),
    ] = None,
    planes: Annotated[list[int] | None, typer.Option(min=1, max=8, help="K; repeatable. Default: 1 2 3.")] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Tokens; repeatable. Default: 1 4 16 512; on a CPU 6 8 12 too, on a GPU 1024 2048 8192."
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="Write the rows here too; other rows that stand there stay."),
    ] = None,
) -> None:
    """Every operation on packed planes against its dense bf16 baseline and the floor of the memory.

    Example: `mbdist bench kernels --shape 5120x5120 --planes 2 --json kernels.json`
    """
    import torch

    from mbdist.bench.kernels import SHAPE, SHAPES, bench_kernels

    check_folder(json_file)
    sizes = []
    on_gpu = torch.cuda.is_available()
    for name in shape or (["13b", "70b"] if on_gpu else ["13b"]):
        if name not in SHAPES and not re.fullmatch(SHAPE, name):
            raise UserError(f"--shape {name}: {', '.join(SHAPES)}, or rows and columns as in 5120x5120")
        sizes += SHAPES.get(name) or [name]
    default_tokens = [1, 4, 16, 512, 1024, 2048, 8192] if on_gpu else [1, 4, 6, 8, 12, 16, 512]
    bench_kernels(sizes, planes or [1, 2, 3], tokens or default_tokens, json_file)
