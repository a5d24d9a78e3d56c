"""The champion: which version of the registered model is used, how it came to be, and the way back."""

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

from convoy.errors import ConvoyError
from convoy.tracking.store import ABSENT, TrackingStore

# aliases: the version in use, the one that a rollback goes to, and the one that is compared or waits for more evidence
CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
EVENT = "convoy.event."  # before the time, in a tag of both versions that a move of the champion concerns
MOVING = "convoy.moving"  # tag of the registered model: the event that is under way
HAD_CHAMPION = "convoy.crowned"  # tag of the registered model: there has been a champion
TRAIL = "promotions.csv"  # in the run of the version that became the champion: every move until then
STALE = 15 * 60  # seconds after which a lock is taken for one of a process that was killed
PATIENCE = 60  # seconds to wait for another that moves the champion


@dataclasses.dataclass(frozen=True)
class PromotionEvent:
    """A move of the champion."""

    time: str  # UTC, ISO 8601
    kind: Literal["promotion", "rollback"]
    before: int | None  # the version that was the champion; None: there was none
    after: int  # the version that became it
    who: str
    commit: str
    reason: str  # the verdict's summary, or why it was rolled back


def version_of(store: TrackingStore, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points to; None where there is no such alias, or no such model."""
    try:
        return store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None


def current(store: TrackingStore, name: str) -> int | None:
    """The champion's version; None before the first. Raises ConvoyError where there was one and it is gone.

    That there is one is noted in the project too, for a store that is lost takes along that there was one.
    """
    champion = version_of(store, name, CHAMPION)
    if champion is not None:
        note = store.champions / f"{name}.txt"
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"version {champion.version}, as of {now()[:10]}\n")
        return int(champion.version)
    if HAD_CHAMPION in _tags(store, name):
        raise ConvoyError(
            f"model {name} had a champion and has none now (a version or its alias was deleted): nothing is promoted. "
            f'Point to one, such as `make rollback REASON="it was deleted"`, or set the alias on the page of {name}'
        )
    check_note(store.champions, name)
    return None


def check_note(champions: Path, name: str) -> None:
    """Raises ConvoyError where the project remembers a champion of which MLflow knows nothing."""
    note = champions / f"{name}.txt"
    if note.exists():
        raise ConvoyError(
            f"model {name} had a champion ({note.read_text().strip()}), of which this MLflow knows nothing: nothing is "
            "promoted. Put the lost store back, or bring the champion from mlflow.db to the server by `python -m "
            f"pipeline.move`. If it is lost for good, remove {note}: the next run then begins without a champion"
        )


def _tags(store: TrackingStore, name: str) -> dict[str, str]:
    """Of the registered model; none where there is no such model."""
    try:
        return store.client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def set_champion(store: TrackingStore, name: str, event: PromotionEvent) -> None:
    """Make `event.after` the champion instead of `event.before`, which must still be it.

    The move itself is one step; whatever dies before or after it leaves the old or the new champion, and
    `complete_pending` does the rest. Raises ConvoyError where another has moved the champion meanwhile.
    """
    with registry_lock(store, name):
        _finish(store, name)
        _check_unmoved(store, name, event.before)
        store.client.set_registered_model_tag(name, MOVING, json.dumps(dataclasses.asdict(event)))
        store.client.set_registered_model_alias(name, CHAMPION, str(event.after))
        if current(store, name) != event.after:
            raise ConvoyError(f"the champion of {name} was moved by another at the same moment: run `dvc repro` again")
        _finish(store, name)


def complete_pending(store: TrackingStore, name: str) -> None:
    """Complete a move that a killed process began, if there is one, and correct the alias `previous`."""
    _break_stale(store, f"{name}.moving")
    if MOVING in _tags(store, name) or _is_previous_wrong(store, name):
        with registry_lock(store, name):
            _finish(store, name)
            _correct_previous(store, name)


def _finish(store: TrackingStore, name: str) -> None:
    tags = _tags(store, name)
    if MOVING not in tags:
        return
    event = PromotionEvent(**json.loads(tags[MOVING]))
    champion, versions = version_of(store, name, CHAMPION), _versions(store, name)
    # had the alias not been moved, it would still be on the version before
    deleted_since = champion is None and event.after not in versions and event.before in versions
    if deleted_since or (champion is not None and int(champion.version) == event.after):
        store.client.set_registered_model_tag(name, HAD_CHAMPION, "true")
        # it is in the tags of both versions, as each of them may be deleted: what happened to the other stays known
        for version in versions & {event.before, event.after}:
            store.client.set_model_version_tag(name, str(version), f"{EVENT}{event.time}", tags[MOVING])
        _correct_previous(store, name)
        if champion is not None:
            _show_trail(store, name, champion)
    store.client.delete_registered_model_tag(name, MOVING)


def _versions(store: TrackingStore, name: str) -> set[int]:
    """The versions of the model that were not deleted."""
    return {int(version.version) for version in store.client.search_model_versions(f"name = '{name}'")}


def _correct_previous(store: TrackingStore, name: str) -> None:
    """Let the alias `previous` name what the next rollback goes to; remove it where there is nothing to go back to."""
    target, previous = _target(store, name), version_of(store, name, PREVIOUS)
    if target is None:
        if previous is not None:
            store.client.delete_registered_model_alias(name, PREVIOUS)
    elif previous is None or int(previous.version) != target:
        store.client.set_registered_model_alias(name, PREVIOUS, str(target))


def _is_previous_wrong(store: TrackingStore, name: str) -> bool:
    previous = version_of(store, name, PREVIOUS)
    return (int(previous.version) if previous else None) != _target(store, name)


def _show_trail(store: TrackingStore, name: str, version: ModelVersion) -> None:
    """Write the audit trail into the run of a version, as the file TRAIL, where there is that run."""
    if not version.run_id:
        return
    try:
        store.client.log_text(version.run_id, audit_log(store, name).to_csv(index=False), TRAIL)
    except MlflowException as error:  # that run may have been deleted for good; the tags hold all of it
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _check_unmoved(store: TrackingStore, name: str, compared: int | None) -> None:
    champion = version_of(store, name, CHAMPION)
    found = int(champion.version) if champion else None
    if found != compared:
        was, now_is = (f"version {version}" if version else "none" for version in (compared, found))
        raise ConvoyError(
            f"the champion of {name} was {was} when it was compared, and is {now_is} now: nothing was moved. "
            "Run `dvc repro` again to compare with the new one"
        )


def promotion_events(store: TrackingStore, name: str) -> list[PromotionEvent]:
    """All moves of the champion, the oldest first: the audit trail."""
    found = {
        PromotionEvent(**json.loads(value))
        for version in store.client.search_model_versions(f"name = '{name}'")
        for key, value in version.tags.items()
        if key.startswith(EVENT)
    }
    return sorted(found, key=lambda event: event.time)


def audit_log(store: TrackingStore, name: str) -> pd.DataFrame:
    """The audit trail as a table, a row for each event."""
    return pd.DataFrame(
        [dataclasses.asdict(event) for event in promotion_events(store, name)],
        columns=[field.name for field in dataclasses.fields(PromotionEvent)],
    ).astype({"before": "Int64"})


def roll_back(store: TrackingStore, name: str, reason: str, who: str, commit: str) -> PromotionEvent:
    """Make the champion before this one the champion again; the next rollback goes one further back.

    Raises ConvoyError where there is none to go back to.
    """
    champion, target = version_of(store, name, CHAMPION), _target(store, name)
    if target is None:
        is_champion = f"version {champion.version} stays the champion" if champion else "there is no champion"
        raise ConvoyError(
            f"model {name} has no earlier champion to go back to: those before were rolled back or deleted, or there "
            f"were none; {is_champion}. Promote another by `make repro`, or set the alias {CHAMPION} by hand on the "
            f"model's page in MLflow (`make ui`)"
        )
    event = PromotionEvent(now(), "rollback", int(champion.version) if champion else None, target, who, commit, reason)
    set_champion(store, name, event)
    if event.before is not None:
        drop_challenger(store, name, event.before)
    return event


def _target(store: TrackingStore, name: str) -> int | None:
    """The version that the next rollback goes to; None where there is none."""
    champion = version_of(store, name, CHAMPION)
    return rollback_target(
        promotion_events(store, name), int(champion.version) if champion else None, _versions(store, name)
    )


def rollback_target(events: Sequence[PromotionEvent], champion: int | None, there: Container[int]) -> int | None:
    """The last champion before this one that was neither rolled back nor deleted; None where there is no such version.

    `events` are all moves that are known, the oldest first, and `there` the versions that were not deleted. Where
    `champion` is None, the last one was deleted or lost its alias, and the one before that is wanted.
    """
    line: list[int] = []  # the champions that led to the present one, which is the last
    for event in events:
        if event.before is not None:
            _step_to(line, event.before)
        if event.kind == "rollback":
            line = line[:-1]
            _step_to(line, event.after)
        else:
            line = [*(version for version in line if version != event.after), event.after]
    if champion is not None:
        _step_to(line, champion)
    taken_back = rolled_back(events)
    return next((version for version in line[-2::-1] if version in there and version not in taken_back), None)


def _step_to(line: list[int], version: int) -> None:
    """Let the line end in this version: a person may have moved the alias, back or to a version that is new to it."""
    if version in line:
        del line[line.index(version) + 1 :]
    else:
        line.append(version)


def rolled_back(events: Sequence[PromotionEvent]) -> dict[int, PromotionEvent]:
    """The versions that were rolled back and did not become the champion again, each with the event that did it."""
    found: dict[int, PromotionEvent] = {}
    for event in events:
        found.pop(event.after, None)
        if event.kind == "rollback" and event.before is not None:
            found[event.before] = event
    return found


def was_rolled_back(store: TrackingStore, name: str, version: int) -> PromotionEvent | None:
    """The event by which this version was rolled back, unless it became the champion again."""
    return rolled_back(promotion_events(store, name)).get(version)


def drop_challenger(store: TrackingStore, name: str, version: int) -> None:
    """Take the alias `challenger` from this version, which was refused."""
    challenger = version_of(store, name, CHALLENGER)
    if challenger is not None and int(challenger.version) == version:
        store.client.delete_registered_model_alias(name, CHALLENGER)


def now() -> str:
    """UTC, to the microsecond, in ISO 8601."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


@contextlib.contextmanager
def registry_lock(store: TrackingStore, name: str) -> Iterator[None]:
    """One at a time, on all machines: MLflow has no lock, but two models can't have one name.

    Raises ConvoyError where another is at it for longer than a minute.
    """
    lock, owner = f"{name}.moving", f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    until = time.monotonic() + PATIENCE
    while not _acquire(store, lock, owner):
        if time.monotonic() > until:
            raise ConvoyError(f"another process moves the champion of {name}: run `dvc repro` again when it is done")
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
    """Remove the lock, if there is one, of a process that can't do it any more."""
    with contextlib.suppress(MlflowException):
        held = store.client.get_registered_model(lock)
        if time.time() - held.creation_timestamp / 1000 > STALE or _is_dead(held.tags.get("owner", "")):
            store.client.delete_registered_model(lock)


def _is_dead(owner: str) -> bool:
    """Whether the process was on this machine, and is gone."""
    host, _, rest = owner.partition(" ")
    pid = rest.partition(" ")[0]
    return host == socket.gethostname() and pid.isdigit() and not psutil.pid_exists(int(pid))
