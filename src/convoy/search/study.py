"""Studies of Optuna in a database, whose trials several processes share and a killed process loses none of."""

import contextlib
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
from filelock import FileLock, Timeout
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from convoy.core.errors import ConvoyError, describe_error
from convoy.search.space import Space

SamplerName = Literal["tpe", "random"]
# Trials drawn at random before the sampler learns from them.
RANDOM_TRIALS = 5
# Complete trials that a trial is compared with before it may be pruned.
MIN_COMPARED_TRIALS = 4
# How often a trial whose process was killed is started again. One that exhausts the memory would kill each process.
MAX_RETRIES = 3
# Time to wait for another process that writes to the database.
LOCK_TIMEOUT_S = 60
POLL_S = 1.0  # to wait for the trials of other processes
# User attributes of a trial: the process that runs it, how often a process was killed in it, and values it must have.
WORKER, RETRIES, ENQUEUED = "worker", "retries", "enqueued"


class Search:
    """A study that several processes work on.

    Args:
        study: Study of Optuna.
        storage: The database of the study.
        folder: Folder of the locks.
        worker: Name of this process in the study.
        seed: Seed of the sampler.
        sampler: Name of the sampler.
    """

    def __init__(
        self, study: optuna.Study, storage: RDBStorage, folder: Path, worker: str, seed: int, sampler: SamplerName
    ) -> None:
        self.study = study
        self.storage = storage
        self.folder = folder
        self.worker = worker
        self.seed = seed
        self.sampler = sampler
        # Trials begin under this lock.
        self.lock = FileLock(folder / "studies.lock", LOCK_TIMEOUT_S)

    def run(
        self,
        space: Space,
        objective: Callable[[optuna.Trial], float],
        is_over: Callable[[], bool],
        on_trial_end: Callable[[FrozenTrial], None],
    ) -> None:
        """Run trials until the search is over and no other process runs one.

        A trial is pruned if `objective` raises `optuna.TrialPruned`. After any other exception, it is run again by the
        next process.

        Args:
            space: The search space.
            objective: Runs a trial and returns its value, which is better if it is higher.
            is_over: Whether no more trials are to begin.
            on_trial_end: Called with each trial of this process that has ended.
        """
        while True:
            with self.lock:
                self.retry_killed()
                running = self.list_trials(TrialState.RUNNING)
                trial = None if is_over() else self._ask(space)
            if trial is not None:
                self._run_trial(trial, objective)
                on_trial_end(self.study.trials[trial.number])
            elif running:
                time.sleep(POLL_S)
            else:
                return

    def list_trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Return the trials in these states."""
        return self.study.get_trials(deepcopy=False, states=states)

    def enqueue(self, values: Mapping[str, Any]) -> None:
        """Let a trial have these values, unless there is one already."""
        states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
        with self.lock:
            if dict(values) not in [trial.user_attrs.get(ENQUEUED) for trial in self.list_trials(*states)]:
                self.study.enqueue_trial(dict(values), user_attrs={ENQUEUED: dict(values)})

    def _ask(self, space: Space) -> optuna.Trial:
        # Seeded by the number of trials, the same history has the same continuation, also in another process.
        self.study.sampler = make_sampler(self.sampler, self.seed + len(self.study.get_trials(deepcopy=False)))
        trial = self.study.ask(dict(space))
        trial.set_user_attr(WORKER, self.worker)
        return trial

    def _run_trial(self, trial: optuna.Trial, objective: Callable[[optuna.Trial], float]) -> None:
        try:
            value = objective(trial)
        except optuna.TrialPruned:
            self.study.tell(trial, state=TrialState.PRUNED)
        except BaseException:
            with self.lock:
                self._retry(self.study.trials[trial.number], kills=0)
            raise
        else:
            self.study.tell(trial, value)

    def retry_killed(self) -> None:
        """Run trials again whose process is gone."""
        for trial in self.list_trials(TrialState.RUNNING):
            # A process that was killed just after it began a trial has not left its name.
            worker = trial.user_attrs.get(WORKER)
            if worker is None or not _is_alive(self.folder, worker):
                self._retry(trial, kills=1)

    def _retry(self, trial: FrozenTrial, kills: int) -> None:
        retries = trial.user_attrs.get(RETRIES, 0) + kills
        kept = {name: trial.user_attrs[name] for name in (ENQUEUED,) if name in trial.user_attrs}
        # Enqueued first, so that it is not lost if this process is killed here.
        if retries <= MAX_RETRIES:
            self.study.enqueue_trial(trial.params, user_attrs=kept | {RETRIES: retries})
        self.study.tell(trial.number, state=TrialState.FAIL)


@contextlib.contextmanager
def open_search(
    folder: Path, name: str, seed: int, sampler: SamplerName = "tpe", pruner: BasePruner | None = None
) -> Iterator[Search]:
    """Open a study, and create it if it does not exist.

    Args:
        folder: Folder with the database of all studies, `studies.db`.
        name: Name of the study.
        seed: Seed of the sampler.
        sampler: "tpe", the tree-structured Parzen estimator (Bergstra et al. 2011), or "random".
        pruner: Decides which trials end early; by default none does.

    Yields:
        The study, for this process.

    Raises:
        ConvoyError: If the database can't be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    file, worker = folder / "studies.db", uuid.uuid4().hex
    # The system releases the lock of a process however it ends, and so shows whether it still lives.
    with _worker_lock(folder, worker):
        try:
            with FileLock(folder / "studies.lock", LOCK_TIMEOUT_S):
                storage = RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": LOCK_TIMEOUT_S}})
                study = optuna.create_study(
                    storage=storage,
                    study_name=name,
                    direction="maximize",
                    load_if_exists=True,
                    pruner=pruner or NopPruner(),
                )
        # SQLAlchemy and Optuna have exceptions of their own for a damaged file and for one of another version.
        except Exception as error:
            raise ConvoyError(
                f"{file} can't be used ({describe_error(error)}): remove it, which discards the searches in it"
            ) from error
        try:
            yield Search(study, storage, folder, worker, seed, sampler)
        finally:
            storage.engine.dispose()
    _worker_file(folder, worker).unlink(missing_ok=True)


def _worker_file(folder: Path, worker: str) -> Path:
    return folder / f"{worker}.worker"


def _worker_lock(folder: Path, worker: str, timeout: float = 0) -> FileLock:
    return FileLock(_worker_file(folder, worker), timeout)


def _is_alive(folder: Path, worker: str) -> bool:
    """Return whether a process holds the lock of a worker."""
    try:
        with _worker_lock(folder, worker):
            pass
    except Timeout:
        return True
    _worker_file(folder, worker).unlink(missing_ok=True)
    return False


def make_sampler(name: SamplerName, seed: int) -> BaseSampler:
    """Create a sampler, which draws the settings of the next trial."""
    # `constant_liar` keeps processes from trying the same settings at the same time.
    return (
        RandomSampler(seed)
        if name == "random"
        else TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS, constant_liar=True)
    )


def make_pruner(epochs: int) -> BasePruner:
    """Create a pruner, which ends trials that are worse than the median of the others at the same epoch.

    The first third of the epochs is left alone: a high learning rate is worse there and often better in the end.

    Args:
        epochs: Epochs of a complete training.
    """
    return MedianPruner(n_startup_trials=MIN_COMPARED_TRIALS, n_warmup_steps=max(1, epochs // 3))
