"""The champion: which version of the registered model is used, how it came to be, and the way back."""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from typing import Literal

import pandas as pd
import psutil
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from convoy.config import ConvoyError
from convoy.tracking import ABSENT, Store

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"  # aliases
EVENT = "convoy.event."  # before the time, in the tag of a version: it became the champion then
MOVING = "convoy.moving"  # tag of the registered model: the event that is under way
CROWNED = "convoy.crowned"  # tag of the registered model: there has been a champion
TRAIL = "promotions.csv"  # in the run of the version that became the champion: every move until then
STALE = 15 * 60  # seconds after which a lock is taken for one of a process that was killed
PATIENCE = 60  # seconds to wait for another that moves the champion


@dataclasses.dataclass(frozen=True)
class Event:
    """A move of the champion."""

    time: str  # UTC, ISO 8601
    kind: Literal["promotion", "rollback"]
    before: int | None  # the version that was the champion; None: there was none
    after: int  # the version that became it
    who: str
    commit: str
    reason: str  # the verdict's summary, or why it was rolled back


def version_of(store: Store, name: str, alias: str) -> ModelVersion | None:
    """The version that an alias points to; None where there is no such alias, or no such model."""
    try:
        return store.client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code not in ABSENT:
            raise
        return None


def current(store: Store, name: str) -> int | None:
    """The champion's version; None before the first. Raises ConvoyError where there was one and it is gone.

    That there is one is noted in the project too, for a store that is lost takes along that there was one.
    """
    champion, note = version_of(store, name, CHAMPION), store.champions / f"{name}.txt"
    if champion is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(f"version {champion.version}, as of {now()[:10]}\n")
        return int(champion.version)
    if CROWNED in _tags(store, name):
        raise ConvoyError(
            f"model {name} had a champion and has none now (a version or its alias was deleted): nothing is promoted. "
            f'Point to one, such as `make rollback REASON="it was deleted"`, or set the alias on the page of {name}'
        )
    if note.exists():
        raise ConvoyError(
            f"model {name} had a champion ({note.read_text().strip()}), of which this MLflow knows nothing: nothing is "
            "promoted. Put the lost store back, or bring the champion from mlflow.db to the server by `python -m "
            f"pipeline.move`. If it is lost for good, remove {note}: the next run then begins without a champion"
        )
    return None


def _tags(store: Store, name: str) -> dict[str, str]:
    """Of the registered model; none where there is no such model."""
    try:
        return store.client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}


def move(store: Store, name: str, event: Event) -> None:
    """Make `event.after` the champion instead of `event.before`, which must still be it.

    The move itself is one step; whatever dies before or after it leaves the old or the new champion, and `finish` does
    the rest. Raises ConvoyError where another has moved the champion meanwhile.
    """
    with alone(store, name):
        _finish(store, name)
        _check_unmoved(store, name, event.before)
        store.client.set_registered_model_tag(name, MOVING, json.dumps(dataclasses.asdict(event)))
        store.client.set_registered_model_alias(name, CHAMPION, str(event.after))
        if current(store, name) != event.after:
            raise ConvoyError(f"the champion of {name} was moved by another at the same moment: run `dvc repro` again")
        _finish(store, name)


def finish(store: Store, name: str) -> None:
    """Bring to its end what a killed process left of a move, if there is such."""
    _break_dead(store, f"{name}.moving")
    if MOVING in _tags(store, name):
        with alone(store, name):
            _finish(store, name)


def _finish(store: Store, name: str) -> None:
    tags = _tags(store, name)
    if MOVING not in tags:
        return
    event = Event(**json.loads(tags[MOVING]))
    champion = version_of(store, name, CHAMPION)
    if champion is not None and int(champion.version) == event.after:  # it came to be
        store.client.set_registered_model_tag(name, CROWNED, "true")
        store.client.set_model_version_tag(name, str(event.after), f"{EVENT}{event.time}", tags[MOVING])
        with contextlib.suppress(MlflowException):  # that version may have been deleted
            if event.before is not None:
                store.client.set_registered_model_alias(name, PREVIOUS, str(event.before))
            else:
                store.client.delete_registered_model_alias(name, PREVIOUS)
        _show_trail(store, name, champion)
    store.client.delete_registered_model_tag(name, MOVING)


def _show_trail(store: Store, name: str, version: ModelVersion) -> None:
    """Write the audit trail into the run of a version, as the file TRAIL, where there is that run."""
    if not version.run_id:
        return
    try:
        store.client.log_text(version.run_id, trail(store, name).to_csv(index=False), TRAIL)
    except MlflowException as error:  # that run may have been deleted for good; the tags hold all of it
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def _check_unmoved(store: Store, name: str, compared: int | None) -> None:
    champion = version_of(store, name, CHAMPION)
    found = int(champion.version) if champion else None
    if found != compared:
        was, now_is = (f"version {version}" if version else "none" for version in (compared, found))
        raise ConvoyError(
            f"the champion of {name} was {was} when it was compared, and is {now_is} now: nothing was moved. "
            "Run `dvc repro` again to compare with the new one"
        )


def events(store: Store, name: str) -> list[Event]:
    """All moves of the champion that came to be, the oldest first: the audit trail."""
    found = [
        Event(**json.loads(value))
        for version in store.client.search_model_versions(f"name = '{name}'")
        for key, value in version.tags.items()
        if key.startswith(EVENT)
    ]
    return sorted(found, key=lambda event: event.time)


def trail(store: Store, name: str) -> pd.DataFrame:
    """The audit trail as a table, a row for each event."""
    return pd.DataFrame(
        [dataclasses.asdict(event) for event in events(store, name)],
        columns=[field.name for field in dataclasses.fields(Event)],
    ).astype({"before": "Int64"})


def roll_back(store: Store, name: str, reason: str, who: str, commit: str) -> Event:
    """Make the champion before this one the champion again.

    Raises ConvoyError where there is none to go back to.
    """
    champion, previous = version_of(store, name, CHAMPION), version_of(store, name, PREVIOUS)
    if previous is None:
        raise ConvoyError(f"model {name} has no version with the alias {PREVIOUS}: there is nothing to go back to")
    before = int(champion.version) if champion else None
    event = Event(now(), "rollback", before, int(previous.version), who, commit, reason)
    move(store, name, event)
    return event


def was_rolled_back(store: Store, name: str, version: int) -> Event | None:
    """The event by which this version was taken back, where it is the last that concerns it."""
    concerned = [event for event in events(store, name) if version in (event.before, event.after)]
    last = concerned[-1] if concerned else None
    return last if last and last.kind == "rollback" and last.before == version else None


def now() -> str:
    """UTC, to the microsecond, in ISO 8601."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


@contextlib.contextmanager
def alone(store: Store, name: str) -> Iterator[None]:
    """One at a time, on all machines: MLflow has no lock, but two models can't have one name.

    Raises ConvoyError where another is at it for longer than a minute.
    """
    lock, owner = f"{name}.moving", f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
    until = time.monotonic() + PATIENCE
    while not _take(store, lock, owner):
        if time.monotonic() > until:
            raise ConvoyError(f"another process moves the champion of {name}: run `dvc repro` again when it is done")
        time.sleep(1)
    try:
        yield
    finally:
        with contextlib.suppress(MlflowException):
            if store.client.get_registered_model(lock).tags.get("owner") == owner:
                store.client.delete_registered_model(lock)


def _take(store: Store, lock: str, owner: str) -> bool:
    words = "A lock: the champion is being moved. It goes by itself."
    try:
        store.client.create_registered_model(lock, tags={"owner": owner}, description=words)
        return True
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    _break_dead(store, lock)
    return False


def _break_dead(store: Store, lock: str) -> None:
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
