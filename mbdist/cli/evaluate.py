from __future__ import annotations

from typing import Annotated

import typer

from mbdist.cli.options import GgufFile, ModelPath, TrustRemoteCode
from mbdist.errors import UserError


def evaluate(
    model: ModelPath,
    text: Annotated[list[str] | None, typer.Option(help="Text file or shell pattern; repeatable.")] = None,
    python_docs: Annotated[
        bool, typer.Option("--python-docs", help="Use the prose of Python's documentation.")
    ] = False,
    window: Annotated[int, typer.Option(min=8, help="Tokens a window.")] = 512,
    skip_windows: Annotated[int, typer.Option(min=0, help="Leave out the first so many: what a run trained on.")] = 0,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Measure on the first so many windows.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows a forward pass.")] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, bf16 or fp32.")] = "auto",
    gguf_file: GgufFile = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure perplexity over windows of text; prints one JSON object.

    Example: `mbdist eval runs/quickstart/model --python-docs --window 256 --skip-windows 397`
    """
    if bool(text) == python_docs:
        raise UserError("name what to measure on: --text FILE, or --python-docs")
    for option, value, allowed in (
        ("--device", device, ("auto", "cpu", "cuda")),
        ("--precision", precision, ("auto", "bf16", "fp32")),
    ):
        if value not in allowed:
            raise UserError(f"{option} {value}: there is {', '.join(allowed)}")
    import json

    import torch

    from mbdist.comm.communicator import Communicator
    from mbdist.config.schema import ClusterConfig, DataConfig, ModelConfig, PythonDocsSource, TextSource
    from mbdist.data.windows import load_windows
    from mbdist.model.layers import bits_per_weight
    from mbdist.model.loading import check_window, is_multi_boolean, load_model, load_tokenizer
    from mbdist.train.environment import choose_device, compute_dtype
    from mbdist.train.evaluate import perplexity

    source = ModelConfig(path=model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    data = PythonDocsSource(type="python_docs") if python_docs else TextSource(type="text", paths=text)
    chosen = choose_device(ClusterConfig(device=device))
    dtype = compute_dtype(precision, chosen)
    loaded = load_model(source, dtype).to(chosen)
    check_window(window, loaded.config, "--window")
    windows = load_windows(data, DataConfig(train=data, window=window), load_tokenizer(source)).with_format("torch")
    if skip_windows >= len(windows):
        raise UserError(f"--skip-windows {skip_windows} leaves nothing of {len(windows)} windows")
    last = len(windows) if max_windows is None else min(skip_windows + max_windows, len(windows))
    windows = windows.select(range(skip_windows, last))

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(chosen.type, dtype, enabled=dtype != torch.float32):
            return loaded(input_ids=ids, use_cache=False).logits

    value = perplexity(logits_of, windows, batch, Communicator(), chosen)
    found = {"model": model, "perplexity": value, "windows": len(windows), "window": window}
    if is_multi_boolean(source):
        found["bits_per_weight"] = round(bits_per_weight(loaded), 4)
    print(json.dumps(found))
