"""Zero-shot tasks through the lm-eval package (``pip install 'mbdist[eval]'``)."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mbdist.errors import UserError


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    task_folder: Path | None,  # further task files (YAML); they may read local data
    batch_size: int,
    limit: int | None,  # examples a task
) -> dict[str, dict[str, float]]:
    """{task: {metric: value}}. Raises UserError without the package and for a task that it does not know."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("zero-shot tasks need the lm-eval package: pip install 'mbdist[eval]'") from None
    if task_folder is not None and not task_folder.is_dir():
        raise UserError(f"--task-folder {task_folder} is not a folder")
    manager = TaskManager(include_path=str(task_folder) if task_folder is not None else None)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UserError(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(wrapped, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    return {
        task: {name.removesuffix(",none"): value for name, value in metrics.items() if isinstance(value, float)}
        for task, metrics in found["results"].items()
    }
