from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mbdist.cli.options import GgufFile, ModelPath, PythonDocs, TextFiles, TrustRemoteCode, check_choice, text_source
from mbdist.errors import UserError


def evaluate(
    model: ModelPath,
    text: TextFiles = None,
    python_docs: PythonDocs = False,
    window: Annotated[int, typer.Option(min=8, help="Tokens a window.")] = 512,
    skip_windows: Annotated[int, typer.Option(min=0, help="Leave out the first so many: what a run trained on.")] = 0,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Measure on the first so many windows.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows a forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    teacher: Annotated[str | None, typer.Option(help="Model to measure KL and top-1 agreement against.")] = None,
    teacher_gguf_file: Annotated[str | None, typer.Option(help="Name of the teacher's GGUF file.")] = None,
    preparation: Annotated[
        str, typer.Option(help="packed, or as published tables have it (GPTQ): wikitext2, c4.")
    ] = "packed",
    tasks: Annotated[
        str | None, typer.Option(help="Zero-shot tasks for lm-eval instead of perplexity: names, comma between.")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder of further lm-eval task files (YAML).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples a task.")] = None,
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure a model; prints one JSON object.

    Perplexity over windows of text, with --teacher also KL and agreement of the top-1 token, or zero-shot tasks.

    Example: `mbdist eval runs/quickstart/model --python-docs --window 256 --skip-windows 397`
    Example: `mbdist eval out/2bit --text wiki.test.raw --preparation wikitext2 --window 2048`
    Example: `mbdist eval out/2bit --text c4-validation.00000-of-00008.json.gz --preparation c4 --window 2048`
    Example: `mbdist eval out/2bit --tasks arc_easy,piqa`
    """
    if (text is not None) + python_docs + (tasks is not None) != 1:
        raise UserError("name what to measure on: --text FILE, --python-docs, or --tasks NAMES")
    check_choice("--preparation", preparation, ("packed", "wikitext2", "c4"))
    check_choice("--device", device, ("auto", "cpu", "cuda"))
    check_choice("--precision", precision, ("auto", "bf16", "fp32"))
    data = text_source(text)
    import dataclasses
    import json

    from mbdist.comm.communicator import Communicator
    from mbdist.config.cluster import ClusterConfig
    from mbdist.config.data import DataConfig
    from mbdist.config.model import ModelConfig
    from mbdist.data.published import published_windows
    from mbdist.data.sources import load_documents
    from mbdist.data.windows import load_windows
    from mbdist.model.layers import bits_per_weight
    from mbdist.model.loading import check_window, is_multi_boolean, load_model, load_tokenizer
    from mbdist.model.readout import reader_of
    from mbdist.train.environment import choose_device, compute_dtype
    from mbdist.train.evaluate import evaluate as measure
    from mbdist.train.teachers import LiveTeacher

    source = ModelConfig(path=model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    chosen = choose_device(ClusterConfig(device=device))
    dtype = compute_dtype(precision, chosen)
    loaded = load_model(source, dtype).to(chosen)
    tokenizer = load_tokenizer(source)
    found: dict = {"model": model}
    if is_multi_boolean(source):
        found["bits_per_weight"] = round(bits_per_weight(loaded), 4)
    if tasks is not None:
        from mbdist.train.zero_shot import zero_shot

        found["tasks"] = zero_shot(loaded, tokenizer, tasks.split(","), task_folder, batch, limit)
        print(json.dumps(found))
        return
    check_window(window, loaded.config, "--window")
    if preparation == "packed":
        windows = load_windows(data, DataConfig(train=data, window=window), tokenizer).with_format("torch")
    else:
        windows = published_windows(preparation, load_documents(data), tokenizer, window)
    if skip_windows >= len(windows):
        raise UserError(f"--skip-windows {skip_windows} leaves nothing of {len(windows)} windows")
    last = len(windows) if max_windows is None else min(skip_windows + max_windows, len(windows))
    windows = windows.select(range(skip_windows, last))

    teach = None
    if teacher is not None:
        teacher_source = ModelConfig(path=teacher, gguf_file=teacher_gguf_file, trust_remote_code=trust_remote_code)
        teacher_model = load_model(teacher_source, dtype).to(chosen)
        if teacher_model.config.vocab_size != loaded.config.vocab_size:
            raise UserError(f"--teacher {teacher} has another vocabulary than {model}; KL needs the same one")
        teach = LiveTeacher(teacher_model, chosen, dtype).teach
    result = measure(reader_of(loaded, chosen, dtype), windows, batch, Communicator(), chosen, teach)
    found |= {name: value for name, value in dataclasses.asdict(result).items() if value is not None}
    found |= {"windows": len(windows), "window": window, "preparation": preparation}
    print(json.dumps(found))
