"""The alias `champion` of a registered model: moved by one process at a time, with an audit log and a rollback."""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Literal

import pandas as pd
import psutil
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from convoy.core.csv_file import format_csv
from convoy.core.errors import ConvoyError
from convoy.tracking.store import NOT_FOUND_CODES, TrackingStore

# Aliases of the version in use, of the version that the next rollback restores, and of the version that is being
# evaluated or waits for more evidence.
CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
# Prefix of the tag, followed by the time, that records an event on both versions it concerns.
EVENT_TAG_PREFIX = "convoy.event."
# Tag of the registered model that holds the event in progress.
PENDING_EVENT_TAG = "convoy.moving"
# Tag of the registered model that is set once there has been a champion.
HAD_CHAMPION_TAG = "convoy.crowned"
# Artifact in the run of a new champion that lists all events up to its promotion.
AUDIT_LOG_FILE = "promotions.csv"
# Age at which a lock is considered to be left by a killed process.
STALE = 15 * 60  # seconds
# Time to wait for another process that is changing the champion.
LOCK_TIMEOUT_S = 60  # seconds


@dataclasses.dataclass(frozen=True)
class PromotionEvent:
    """A change of the champion, either a promotion or a rollback."""

    time: str  # UTC, ISO 8601
    kind: Literal["promotion", "rollback"]
    before: int | None  # version of the old champion; None: there was none
    after: int  # version of the new champion
    who: str  # user
    commit: str  # Git commit
    reason: str  # summary of the verdict, or the reason for the rollback


def version_of(store: TrackingStore, name: str, alias: str) -> ModelVersion | None:
    """Return the version that an alias points to, or `None` if the alias or the model does not exist."""
    try:
        return store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND_CODES:
            raise
        return None


def current_version(store: TrackingStore, name: str) -> int | None:
    """Return the champion's version, or `None` before the first promotion.

    The existence of a champion is also noted in a file of the project, so that the loss of the MLflow store does not
    go unnoticed.

    Raises:
        ConvoyError: If there was a champion and it is missing now.
    """
    champion = version_of(store, name, CHAMPION)
    if champion is not None:
        note = store.champion_notes / f"{name}.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"version {champion.version}, as of {utc_now()[:10]}\n")
        return int(champion.version)
    if HAD_CHAMPION_TAG in _tags(store, name):
        raise ConvoyError(
            f"model {name} had a champion and has none now (a version or its alias was deleted): nothing is promoted. "
            f'Point to one, such as `convoy rollback --reason "it was deleted"`, or set the alias on the page of {name}'
        )
    check_champion_note(store.champion_notes, name)
    return None


def check_champion_note(champions: Path, name: str) -> None:
    """Raise `ConvoyError` if the project's note names a champion that MLflow does not know.

    Args:
        champions: The folder of the notes.
        name: The name of the registered model.
    """
    note = champions / f"{name}.txt"
    if note.exists():
        raise ConvoyError(
            f"model {name} had a champion ({note.read_text().strip()}), of which this MLflow knows nothing: nothing is "
            "promoted. Put the lost store back, or copy the champion from mlflow.db to the server by `convoy migrate`. "
            f"If it is lost for good, remove {note}: the next run then begins without a champion"
        )


def _tags(store: TrackingStore, name: str) -> dict[str, str]:
    """Return the tags of the registered model, or an empty dictionary if it does not exist."""
    try:
        return store.client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def set_champion(store: TrackingStore, name: str, event: PromotionEvent) -> None:
    """Make `event.after` the champion in place of `event.before`, unless another process has done so already.

    The alias is moved in one atomic step. A process that is killed before or after it leaves either the old or the
    new champion, and `complete_pending` completes what is missing.

    Raises:
        ConvoyError: If another process has made another version the champion in the meantime.
    """
    with registry_lock(store, name):
        _complete_pending(store, name)
        found = version_of(store, name, CHAMPION)
        if found and int(found.version) == event.after:
            return
        _check_unchanged(store, name, event.before)
        store.client.set_registered_model_tag(name, PENDING_EVENT_TAG, json.dumps(dataclasses.asdict(event)))
        store.client.set_registered_model_alias(name, CHAMPION, str(event.after))
        if current_version(store, name) != event.after:
            raise ConvoyError(f"the champion of {name} was moved by another at the same moment: run `convoy run` again")
        _complete_pending(store, name)


def complete_pending(store: TrackingStore, name: str) -> None:
    """Complete a change of the champion that a killed process left unfinished, and correct the alias `previous`."""
    _break_stale(store, f"{name}.moving")
    if PENDING_EVENT_TAG in _tags(store, name) or _is_previous_wrong(store, name):
        with registry_lock(store, name):
            _complete_pending(store, name)
            _correct_previous(store, name)


def _complete_pending(store: TrackingStore, name: str) -> None:
    tags = _tags(store, name)
    if PENDING_EVENT_TAG not in tags:
        return
    event = PromotionEvent(**json.loads(tags[PENDING_EVENT_TAG]))
    champion, versions = version_of(store, name, CHAMPION), _versions(store, name)
    # The champion is missing. If the alias had not been moved, it would still point to the existing version `before`,
    # so it was moved to `after`, which was deleted since.
    deleted_since = champion is None and event.after not in versions and event.before in versions
    if deleted_since or (champion is not None and int(champion.version) == event.after):
        store.client.set_registered_model_tag(name, HAD_CHAMPION_TAG, "true")
        # Record the event on both versions, so that it survives if one of them is deleted.
        for version in versions & {event.before, event.after}:
            store.client.set_model_version_tag(
                name, str(version), f"{EVENT_TAG_PREFIX}{event.time}", tags[PENDING_EVENT_TAG]
            )
        _correct_previous(store, name)
        if champion is not None:
            _write_audit_log(store, name, champion)
    store.client.delete_registered_model_tag(name, PENDING_EVENT_TAG)


def _versions(store: TrackingStore, name: str) -> set[int]:
    """Return the existing versions of the model."""
    return {int(version.version) for version in store.client.search_model_versions(f"name = '{name}'")}


def _correct_previous(store: TrackingStore, name: str) -> None:
    """Point the alias `previous` to the version that the next rollback restores, or remove it if there is none."""
    target, previous = _rollback_target(store, name), version_of(store, name, PREVIOUS)
    if target is None:
        if previous is not None:
            store.client.delete_registered_model_alias(name, PREVIOUS)
    elif previous is None or int(previous.version) != target:
        store.client.set_registered_model_alias(name, PREVIOUS, str(target))


def _is_previous_wrong(store: TrackingStore, name: str) -> bool:
    previous = version_of(store, name, PREVIOUS)
    return (int(previous.version) if previous else None) != _rollback_target(store, name)


def _write_audit_log(store: TrackingStore, name: str, version: ModelVersion) -> None:
    """Write the audit trail to the artifact `AUDIT_LOG_FILE` of the version's run, if that run exists."""
    if not version.run_id:
        return
    try:
        store.client.log_text(version.run_id, format_csv(audit_log(store, name)), AUDIT_LOG_FILE)
    except MlflowException as error:
        # The run may have been deleted permanently. Nothing is lost, as the tags hold the complete audit trail.
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _check_unchanged(store: TrackingStore, name: str, compared: int | None) -> None:
    champion = version_of(store, name, CHAMPION)
    found = int(champion.version) if champion else None
    if found != compared:
        was, now_is = (f"version {version}" if version else "none" for version in (compared, found))
        raise ConvoyError(
            f"the champion of {name} was {was} when it was compared, and is {now_is} now: nothing was moved. "
            "Run `convoy run` again to compare with the new one"
        )


def promotion_events(store: TrackingStore, name: str) -> list[PromotionEvent]:
    """Return all changes of the champion, oldest first."""
    found = {
        PromotionEvent(**json.loads(value))
        for version in store.client.search_model_versions(f"name = '{name}'")
        for key, value in version.tags.items()
        if key.startswith(EVENT_TAG_PREFIX)
    }
    return sorted(found, key=lambda event: event.time)


def audit_log(store: TrackingStore, name: str) -> pd.DataFrame:
    """Return the audit trail as a table with one row per event."""
    return pd.DataFrame(
        [dataclasses.asdict(event) for event in promotion_events(store, name)],
        columns=[field.name for field in dataclasses.fields(PromotionEvent)],
    ).astype({"before": "Int64"})


def roll_back(store: TrackingStore, name: str, reason: str, who: str, commit: str) -> PromotionEvent:
    """Restore the previous champion; each further rollback goes back by one more.

    Args:
        store: The MLflow store.
        name: The name of the registered model.
        reason: The reason for the rollback, kept in the audit trail.
        who: The user who requests it.
        commit: The Git commit of the project.

    Returns:
        The recorded event.

    Raises:
        ConvoyError: If there is no earlier champion to restore.
    """
    champion, target = version_of(store, name, CHAMPION), _rollback_target(store, name)
    if target is None:
        is_champion = f"version {champion.version} stays the champion" if champion else "there is no champion"
        raise ConvoyError(
            f"model {name} has no earlier champion to go back to: those before were rolled back or deleted, or there "
            f"were none; {is_champion}. Promote another by `convoy run`, or set the alias {CHAMPION} by hand on the "
            f"model's page in MLflow (`convoy ui`)"
        )
    event = PromotionEvent(
        utc_now(), "rollback", int(champion.version) if champion else None, target, who, commit, reason
    )
    set_champion(store, name, event)
    if event.before is not None:
        drop_challenger(store, name, event.before)
    return event


def _rollback_target(store: TrackingStore, name: str) -> int | None:
    """Return the version that the next rollback restores, or `None` if there is none."""
    champion = version_of(store, name, CHAMPION)
    return rollback_target(
        promotion_events(store, name), int(champion.version) if champion else None, _versions(store, name)
    )


def rollback_target(events: Sequence[PromotionEvent], champion: int | None, existing: Container[int]) -> int | None:
    """Return the latest earlier champion that was neither rolled back nor deleted, or `None` if there is none.

    Args:
        events: All known changes of the champion, oldest first.
        champion: The current champion's version. `None` means that the last champion was deleted or lost its alias;
            the champion before it is returned.
        existing: The existing versions.
    """
    # The champions that led to the current one, which comes last.
    line: list[int] = []
    for event in events:
        if event.before is not None:
            _continue_line(line, event.before)
        if event.kind == "rollback":
            line = line[:-1]
            _continue_line(line, event.after)
        else:
            line = [*(version for version in line if version != event.after), event.after]
    if champion is not None:
        _continue_line(line, champion)
    taken_back = rolled_back(events)
    return next((version for version in line[-2::-1] if version in existing and version not in taken_back), None)


def _continue_line(line: list[int], version: int) -> None:
    """Make `version` the end of the line, truncating the line if it contains the version already.

    This covers an alias that was moved by hand, to an earlier champion or to a version that never was one.
    """
    if version in line:
        del line[line.index(version) + 1 :]
    else:
        line.append(version)


def rolled_back(events: Sequence[PromotionEvent]) -> dict[int, PromotionEvent]:
    """Return the versions that were rolled back and not promoted again, each with the event of its rollback."""
    found: dict[int, PromotionEvent] = {}
    for event in events:
        found.pop(event.after, None)
        if event.kind == "rollback" and event.before is not None:
            found[event.before] = event
    return found


def was_rolled_back(store: TrackingStore, name: str, version: int) -> PromotionEvent | None:
    """Return the event that rolled this version back, or `None` if there is none or it became the champion again."""
    return rolled_back(promotion_events(store, name)).get(version)


def drop_challenger(store: TrackingStore, name: str, version: int) -> None:
    """Remove the alias `challenger` if it points to this version."""
    challenger = version_of(store, name, CHALLENGER)
    if challenger is not None and int(challenger.version) == version:
        store.client.delete_registered_model_alias(name, CHALLENGER)


def utc_now() -> str:
    """Return the current time in UTC as an ISO 8601 string with microseconds."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


@contextlib.contextmanager
def registry_lock(store: TrackingStore, name: str) -> Iterator[None]:
    """Hold a lock on the registered model that works across machines.

    MLflow offers no locks, but the names of its registered models are unique. The lock is therefore a registered model
    with a name of its own.

    Raises:
        ConvoyError: If another process holds the lock for longer than `LOCK_TIMEOUT_S` seconds.
    """
    lock, owner = f"{name}.moving", f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    until = time.monotonic() + LOCK_TIMEOUT_S
    while not _acquire(store, lock, owner):
        if time.monotonic() > until:
            raise ConvoyError(f"another process moves the champion of {name}: run `convoy run` again when it is done")
        time.sleep(1)
    try:
        yield
    finally:
        with contextlib.suppress(MlflowException):
            if store.client.get_registered_model(lock).tags.get("owner") == owner:
                store.client.delete_registered_model(lock)


def _acquire(store: TrackingStore, lock: str, owner: str) -> bool:
    words = "A lock: the champion is being moved. It goes by itself."
    try:
        store.client.create_registered_model(lock, tags={"owner": owner}, description=words)
        return True
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    _break_stale(store, lock)
    return False


def _break_stale(store: TrackingStore, lock: str) -> None:
    """Remove the lock if the process that holds it no longer runs, or it is older than `STALE` seconds."""
    with contextlib.suppress(MlflowException):
        held = store.client.get_registered_model(lock)
        if time.time() - held.creation_timestamp / 1000 > STALE or _is_dead(held.tags.get("owner", "")):
            store.client.delete_registered_model(lock)


def _is_dead(owner: str) -> bool:
    """Return whether the lock's owner was a process on this machine that no longer exists."""
    host, _, rest = owner.partition(" ")
    pid = rest.partition(" ")[0]
    return host == socket.gethostname() and pid.isdigit() and not psutil.pid_exists(int(pid))
