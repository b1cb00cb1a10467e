"""Writes a teacher cache (``teacher_cache``): every rank its share of the parts that are not there yet."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from mbdist.comm.communicator import Communicator
from mbdist.config.schema import RunConfig
from mbdist.data import digest_of_windows, load_corpus
from mbdist.data.batches import fetch
from mbdist.errors import UserError
from mbdist.loss import TopTokens
from mbdist.model.loading import check_window, load_model_config, load_tokenizer
from mbdist.model.readout import Head, blocks
from mbdist.train.environment import compute_dtype
from mbdist.train.evaluate import evaluate
from mbdist.train.prepare import teacher_source
from mbdist.train.teacher_cache import CacheHeader, bytes_a_token, cache_folder, write_part
from mbdist.train.teachers import LiveTeacher, live_teacher

_LONG = timedelta(days=7)  # rank 0 tokenises, ranks end at times of their own


def write_cache(config: RunConfig, communicator: Communicator, device: torch.device) -> CacheHeader:
    """Write what is missing of the cache that ``config.loss`` describes; all ranks call it together. ``config.loss``
    names the teacher as for a run with ``loss.teacher: float``. Raises UserError where the folder holds the cache of
    another run, or the disk has too little room."""
    waiting = dist.new_group(backend="gloo", timeout=_LONG) if communicator.world_size > 1 else None
    source = teacher_source(config.model_copy(update={"loss": config.loss.model_copy(update={"teacher": "float"})}))
    folder, tokenizer = cache_folder(config), load_tokenizer(config.model)
    text_config = load_model_config(source).get_text_config(decoder=True)
    check_window(config.data.window, text_config, "data.window")

    def begin() -> CacheHeader:
        windows = load_corpus(config.data, tokenizer).train  # tokenised once, for all
        return _open_folder(folder, CacheHeader.of(config, windows, source, text_config.vocab_size))

    header = _by_the_first(begin, communicator.rank, waiting)
    corpus = load_corpus(config.data, tokenizer)
    missing = communicator.all_gather_objects(header.missing_parts(folder), "agreement")[0]
    if not missing and header.held_out is not None:
        return header
    teacher = live_teacher(source, config.loss.teacher_placement, device, compute_dtype(config.train.precision, device))
    ranks, together = communicator.world_size, config.loss.teacher_placement == "sharded"
    mine = missing[communicator.rank :: ranks]
    with Progress(console=Console(), disable=communicator.rank != 0) as progress:
        task = progress.add_task("caching the first worker's share", total=len(mine))
        for turn in range(-(-len(missing) // ranks) if together else len(mine)):
            part = mine[turn] if turn < len(mine) else None  # another rank's last part: help to gather the weights
            windows = _windows_of(teacher, config, corpus.train, header, part, together, device)
            if part is not None:
                write_part(folder / header.part(part)[0], windows, header.vocabulary)
                progress.advance(task)
    if waiting is not None:
        dist.barrier(group=waiting)
    if header.held_out is None:
        found = evaluate(teacher.read, corpus.eval, config.train.eval_batch, communicator, device)
        held_out = {"windows": digest_of_windows(corpus.eval), "perplexity": found.perplexity}
        header = dataclasses.replace(header, held_out=held_out)
        if communicator.rank == 0:
            header.write(folder)
    return header


def _by_the_first(begin: Callable[[], CacheHeader], rank: int, group: dist.ProcessGroup | None) -> CacheHeader:
    """What ``begin`` returns on rank 0, or the UserError that it raises there, on all ranks."""
    outcome: list = [None]
    if rank == 0:
        try:
            outcome = [begin()]
        except UserError as error:
            outcome = [error]
    if group is not None:
        dist.broadcast_object_list(outcome, src=0, group=group)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    return outcome[0]


def _open_folder(folder: Path, header: CacheHeader) -> CacheHeader:
    """Leave the header in the folder, or see that the one there is of the same cache; what is there then."""
    folder.mkdir(parents=True, exist_ok=True)
    for interrupted in folder.glob(".*.tmp-*"):
        interrupted.unlink()
    there = CacheHeader.read(folder)
    if there is not None:
        there.check_against(header.facts, folder)
        if there.top_k != header.top_k:
            raise UserError(
                f"the teacher cache {folder} holds {there.top_k} tokens of a position, loss.cache.top_k = "
                f"{header.top_k}: name another folder with -o, or set loss.cache.top_k={there.top_k} to complete it"
            )
        header = there
    elif any(folder.iterdir()):
        raise UserError(f"{folder} holds no teacher cache, but is not empty: name another folder with -o")
    a_window = (header.window - 1) * bytes_a_token(header.top_k, header.vocabulary)
    wanted = sum(len(header.part(number)[1]) for number in header.missing_parts(folder)) * a_window
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise UserError(
            f"the teacher cache takes {wanted / 2**30:.1f} GiB more, {folder} has room for {free / 2**30:.1f} GiB: "
            "name another folder with -o, or lower loss.cache.top_k"
        )
    if there is None:
        header.write(folder)
    return header


def _windows_of(
    teacher: LiveTeacher,
    config: RunConfig,
    windows: datasets.Dataset,
    header: CacheHeader,
    part: int | None,
    together: bool,  # as many passes on every rank, whatever there is to do
    device: torch.device,
) -> list[TopTokens]:
    """What the teacher says about the windows of a part."""
    numbers = list(header.part(part)[1]) if part is not None else []
    batch = config.train.eval_batch
    longest = header.windows_a_part if together else len(numbers)
    found: list[TopTokens] = []
    for first in range(0, longest, batch):
        chosen = numbers[first : first + batch]
        ids = fetch(windows, chosen or [0]).input_ids.to(device)
        found += list(_top_tokens(teacher, ids, header.top_k, config.loss.temperature))[: len(chosen)]
    return found


@torch.no_grad()
def _top_tokens(
    teacher: LiveTeacher,
    input_ids: torch.Tensor,  # (batch, window) int64
    top_k: int,
    temperature: float,
) -> Iterator[TopTokens]:
    """Of every window, on the CPU: all positions but the last."""
    found: list[TopTokens] = []

    def read(states: torch.Tensor, head: Head) -> torch.Tensor:
        rows = states[:, :-1].flatten(0, 1)
        for chunk in head.chunks(rows, None):
            logits = head.logits(rows[chunk])
            for block in blocks(logits):
                log_q = (logits[block].float() / temperature).log_softmax(-1)
                if not torch.isfinite(log_q).all():
                    raise UserError("the teacher's logits are not finite: use train.precision=fp32, or another model")
                found.append(TopTokens.of(log_q, top_k))
        return states

    teacher.read(input_ids, read)
    tokens, log_q, log_rest = (
        torch.cat([getattr(each, name) for each in found]).cpu().unflatten(0, (len(input_ids), -1))
        for name in ("tokens", "log_q", "log_rest")
    )
    return (TopTokens(*of_window) for of_window in zip(tokens, log_q, log_rest, strict=True))
