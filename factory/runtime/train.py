"""Fits on Ray Train: the one loop on workers that come and go.

A worker that restarts, and a job that is submitted again, go on from the newest checkpoint. The global batch does
not depend on the number of workers, so a fit that shrinks or grows sees the same samples (see `fits/objective.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from factory.fits.loop import CHECKPOINT, METRICS, Preview, Progress, Worker, train
from factory.fits.objective import Objective
from factory.fits.sharding import shard
from factory.recipe import FitSection

FAILURES = 3  # lost workers, after each of which a fit goes on from its newest checkpoint


def fit(
    build_objective: Callable[[], Objective],
    section: FitSection,
    directory: Path,
    *,
    use_gpu: bool = False,
    build_preview: Callable[[], Preview] | None = None,
) -> Path:
    """Runs a fit to its end and returns the directory of its weights, `directory/weights`.

    build_objective: called on each worker; must be picklable (a partial over paths and plain values). build_preview:
    called on rank 0 where the section asks for grids.
    directory: on storage that all nodes share; holds `weights/` when done, `metrics.jsonl`, TensorBoard events, and
    Ray Train's checkpoints under `train/`. A fit that is done is not run again. A worker's ValueError is raised as it
    was said there, and at once; after any other failure the fit goes on, `FAILURES` times.
    """
    import ray.train

    directory = directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    for left in reversed(range(FAILURES + 1)):
        try:
            _trainer(build_objective, section, directory, use_gpu, build_preview).fit()
            break
        except ray.train.WorkerGroupError as error:
            refused = _refused(error)
            if refused is not None or not left:
                raise refused or error from None
    return directory / "weights"


def _trainer(
    build_objective: Callable[[], Objective],
    section: FitSection,
    directory: Path,
    use_gpu: bool,
    build_preview: Callable[[], Preview] | None,
) -> Any:
    """A trainer that goes on from what lies in the directory. Ray would try a wrong input as often as a lost machine,
    so it gives up at once and `fit` decides."""
    import ray.train
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        _worker_loop,
        train_loop_config={
            "build": build_objective,
            "section": section,
            "directory": str(directory),
            "preview": build_preview,
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=section.num_workers if section.min_workers is None else _elastic(section),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1.0},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=str(directory),
            failure_config=ray.train.FailureConfig(max_failures=0),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )


def _refused(error: Any) -> ValueError | None:
    """What was wrong with the input, without the traceback that Ray wraps it in; None for any other failure."""
    found = (getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values())
    return next((one for one in found if isinstance(one, ValueError)), None)


def _elastic(section: FitSection) -> tuple[int, int]:
    """The fewest and the most workers: Ray starts the fit again on as many as the cluster has, from its checkpoint."""
    assert section.min_workers is not None
    return section.min_workers, section.num_workers


def _worker_loop(config: dict[str, Any]) -> None:
    import ray.train
    import torch

    context = ray.train.get_context()
    objective, section, directory = config["build"](), config["section"], Path(config["directory"])
    worker = Worker(
        context.get_world_rank(), context.get_world_size(), _device(),
        wrap=_data_parallel, shard=_sharded(section, context.get_world_size()), mean=_mean_of_workers,
    )  # fmt: skip
    if worker.device.type == "cpu":  # Ray allows as many threads as the worker reserves CPUs, and it reserves one
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    with tempfile.TemporaryDirectory() as scratch:
        local = Path(scratch)
        _fetch_checkpoint(local)
        board = _Board(directory / "tensorboard") if worker.rank == 0 else None
        wanted = section.preview_every and worker.rank == 0 and config["preview"] is not None
        preview = config["preview"]() if wanted else None
        model = train(
            objective, section, local, worker=worker, report=lambda p: _report(p, directory, board), preview=preview
        )
        if worker.rank == 0:
            _publish(objective, model, directory)
    torch.cuda.empty_cache() if worker.device.type == "cuda" else None


def _device() -> Any:
    from ray.train.torch import get_device

    return get_device()


def _data_parallel(module: Any) -> Any:
    """DistributedDataParallel where there is more than one worker."""
    import ray.train

    if ray.train.get_context().get_world_size() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(module, find_unused_parameters=True)


def _sharded(section: FitSection, world_size: int) -> Callable[[Any], Any] | None:
    """FSDP2 where the section asks for it and there is more than one worker."""
    return shard if section.sharding == "sharded" and world_size > 1 else None


def _mean_of_workers(metrics: dict[str, float]) -> dict[str, float]:
    """The mean over workers of each metric: the global batch's, whatever the number of workers."""
    import ray.train
    import torch
    import torch.distributed

    count = ray.train.get_context().get_world_size()
    if count == 1:
        return metrics
    total = torch.tensor(list(metrics.values()), dtype=torch.float64, device=_device())
    torch.distributed.all_reduce(total)
    return dict(zip(metrics, (total / count).tolist(), strict=True))


def _fetch_checkpoint(local: Path) -> None:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as stored:
            for name in (CHECKPOINT, METRICS):
                if (Path(stored) / name).exists():
                    shutil.copy(Path(stored) / name, local / name)


def _report(progress: Progress, directory: Path, board: _Board | None) -> None:
    """A barrier: every worker reports; rank 0's report carries the checkpoint."""
    import ray.train

    metrics = {"step": progress.step, **progress.metrics}
    if progress.checkpoint is None:
        ray.train.report(metrics)
        return
    staged = Path(tempfile.mkdtemp(prefix="checkpoint-"))
    for name in (CHECKPOINT, METRICS):
        shutil.copy(progress.checkpoint.parent / name, staged / name)
    shutil.copy(progress.checkpoint.parent / METRICS, directory / METRICS)
    if board is not None:
        board.write(progress)
    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(staged),
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,  # the fit goes on while it travels
        delete_local_checkpoint_after_upload=True,
    )


def _publish(objective: Objective, model: Any, directory: Path) -> None:
    """The weights, put in place whole: a reader finds all of them or none."""
    staged = directory / "weights.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    objective.save(model, staged)
    final = directory / "weights"
    shutil.rmtree(final, ignore_errors=True)
    staged.rename(final)


class _Board:
    """TensorBoard events, always written; and an MLflow run where MLFLOW_TRACKING_URI is set (the extra `mlflow`)."""

    def __init__(self, directory: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))
        self._mlflow = _mlflow_run(directory.parent.name) if os.environ.get("MLFLOW_TRACKING_URI") else None

    def write(self, progress: Progress) -> None:
        for name, value in progress.metrics.items():
            self._writer.add_scalar(name, value, progress.step)
        self._writer.flush()
        if self._mlflow is not None:
            self._mlflow.log_metrics(progress.metrics, step=progress.step)


def _mlflow_run(name: str) -> Any:
    """The MLflow module with a run of this name: the one that an interrupted fit began, or a new one."""
    try:
        import mlflow
    except ImportError as error:
        raise ValueError(
            "MLFLOW_TRACKING_URI must come with the package mlflow, got none; install the extra `mlflow` or unset it."
        ) from error
    mlflow.set_experiment("dermafactory")
    begun = mlflow.search_runs(filter_string=f"tags.mlflow.runName = '{name}'", output_format="list")
    mlflow.start_run(run_id=begun[0].info.run_id) if begun else mlflow.start_run(run_name=name)
    return mlflow
