"""The champion: promotions and rollbacks are atomic and never act on an outdated comparison."""

import contextlib
import dataclasses
import functools
import shutil
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from convoy.core.errors import ConvoyError
from convoy.promotion import champion
from convoy.promotion.champion import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    PromotionEvent,
    audit_log,
    complete_pending,
    current_version,
    roll_back,
    set_champion,
    was_rolled_back,
)
from convoy.registry import versions as registry
from convoy.tracking.store import TrackingStore, open_store
from promotion_fixtures import REGISTRY_WRITES, SimulatedKill, limit_writes, make_promotion

NAME = "convoy"


@pytest.fixture
def store(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrackingStore]:
    """A registry with four versions, and no champion yet."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path)
    with open_store(tmp_path, NAME) as opened:
        opened.client.create_registered_model(NAME)
        for _ in range(4):
            opened.client.create_model_version(NAME, source=(tmp_path / "mlartifacts").as_uri())
        yield opened


def read_aliases(store: TrackingStore) -> dict[str, int]:
    return {name: int(version) for name, version in store.client.get_registered_model(NAME).aliases.items()}


def test_champion_exists_after_the_first_promotion(store: TrackingStore) -> None:
    assert current_version(store, NAME) is None
    set_champion(store, NAME, make_promotion(None, 1))
    assert current_version(store, NAME) == 1
    assert read_aliases(store) == {CHAMPION: 1}


def test_promotion_keeps_the_previous_champion_and_is_logged(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 3)):
        set_champion(store, NAME, make_promotion(before, after))
    assert read_aliases(store) == {CHAMPION: 3, PREVIOUS: 1}
    table = audit_log(store, NAME)
    assert table["after"].tolist() == [1, 3]
    assert table["before"].astype(object).where(table["before"].notna(), None).tolist() == [None, 1]
    assert set(table["who"]) == {"ada"}
    assert table["time"].is_monotonic_increasing


def test_champion_that_another_moved_meanwhile_is_left_alone(store: TrackingStore) -> None:
    set_champion(store, NAME, make_promotion(None, 1))
    store.client.set_registered_model_alias(NAME, CHAMPION, "2")  # by hand
    with pytest.raises(ConvoyError, match="was version 1 when it was compared, and is version 2 now: nothing was"):
        set_champion(store, NAME, make_promotion(1, 3))
    assert read_aliases(store) == {CHAMPION: 2}
    assert audit_log(store, NAME)["after"].tolist() == [1]


def test_promotion_that_another_has_done_meanwhile_is_done_once(store: TrackingStore) -> None:
    set_champion(store, NAME, make_promotion(None, 1))
    set_champion(store, NAME, make_promotion(1, 3))
    set_champion(store, NAME, make_promotion(1, 3))
    assert read_aliases(store) == {CHAMPION: 3, PREVIOUS: 1}
    assert audit_log(store, NAME)["after"].tolist() == [1, 3]


@pytest.mark.parametrize("how", ["version", "alias"])
def test_lost_champion_is_never_a_first_run(store: TrackingStore, how: str) -> None:
    set_champion(store, NAME, make_promotion(None, 1))
    if how == "version":
        store.client.delete_model_version(NAME, "1")
    else:
        store.client.delete_registered_model_alias(NAME, CHAMPION)
    with pytest.raises(ConvoyError, match="had a champion and has none now"):
        current_version(store, NAME)
    with pytest.raises(ConvoyError, match="was version 1 when it was compared, and is none now"):
        set_champion(store, NAME, make_promotion(1, 2))


def test_rollback_restores_the_previous_champion(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2)):
        set_champion(store, NAME, make_promotion(before, after))
    event = roll_back(store, NAME, "it fails on photographs at night", "bob", "1" * 40)
    assert (event.before, event.after) == (2, 1)
    assert read_aliases(store) == {CHAMPION: 1}
    taken_back = was_rolled_back(store, NAME, 2)
    assert taken_back is not None
    assert taken_back.reason == "it fails on photographs at night"
    assert was_rolled_back(store, NAME, 1) is None
    assert audit_log(store, NAME)["kind"].tolist() == ["promotion", "promotion", "rollback"]


def test_each_rollback_goes_one_champion_further_back(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2), (2, 3)):
        set_champion(store, NAME, make_promotion(before, after))
    assert roll_back(store, NAME, "bad", "bob", "1" * 40).after == 2
    assert read_aliases(store) == {CHAMPION: 2, PREVIOUS: 1}
    assert roll_back(store, NAME, "bad, too", "bob", "1" * 40).after == 1
    with pytest.raises(ConvoyError, match=r"no earlier champion to go back to: .* version 1 stays the champion"):
        roll_back(store, NAME, "bad, too", "bob", "1" * 40)
    assert read_aliases(store) == {CHAMPION: 1}

    set_champion(store, NAME, make_promotion(1, 4))
    assert read_aliases(store) == {CHAMPION: 4, PREVIOUS: 1}
    assert roll_back(store, NAME, "bad", "bob", "1" * 40).after == 1
    with pytest.raises(ConvoyError, match="no earlier champion to go back to"):
        roll_back(store, NAME, "bad", "bob", "1" * 40)


def test_rolled_back_version_loses_the_alias_challenger(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2)):
        set_champion(store, NAME, make_promotion(before, after))
    store.client.set_registered_model_alias(NAME, CHALLENGER, "2")
    roll_back(store, NAME, "bad", "bob", "1" * 40)
    assert read_aliases(store) == {CHAMPION: 1}


def test_rollback_passes_over_deleted_versions(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2), (2, 3)):
        set_champion(store, NAME, make_promotion(before, after))
    store.client.delete_model_version(NAME, "2")
    assert roll_back(store, NAME, "bad", "bob", "1" * 40).after == 1


def test_rollback_helps_where_the_champion_was_deleted(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2), (2, 3)):
        set_champion(store, NAME, make_promotion(before, after))
    store.client.delete_model_version(NAME, "3")
    roll_back(store, NAME, "it was deleted", "bob", "1" * 40)
    assert read_aliases(store) == {CHAMPION: 2, PREVIOUS: 1}


def test_rollback_is_known_after_its_target_is_deleted(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2), (2, 3)):
        set_champion(store, NAME, make_promotion(before, after))
    roll_back(store, NAME, "bad", "bob", "1" * 40)
    store.client.delete_model_version(NAME, "2")
    assert was_rolled_back(store, NAME, 3) is not None
    assert roll_back(store, NAME, "it was deleted", "bob", "1" * 40).after == 1


def test_alias_moved_by_hand_is_where_a_rollback_begins(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2), (2, 3)):
        set_champion(store, NAME, make_promotion(before, after))
    store.client.set_registered_model_alias(NAME, CHAMPION, "2")
    complete_pending(store, NAME)
    assert read_aliases(store) == {CHAMPION: 2, PREVIOUS: 1}
    set_champion(store, NAME, make_promotion(2, 4))
    assert [roll_back(store, NAME, "bad", "bob", "1" * 40).after for _ in range(2)] == [2, 1]


def test_rolled_back_champion_set_by_hand_is_passed_over(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2)):
        set_champion(store, NAME, make_promotion(before, after))
    roll_back(store, NAME, "bad", "bob", "1" * 40)
    store.client.set_registered_model_alias(NAME, CHAMPION, "2")
    set_champion(store, NAME, make_promotion(2, 3))
    assert read_aliases(store) == {CHAMPION: 3, PREVIOUS: 1}
    assert roll_back(store, NAME, "bad", "bob", "1" * 40).after == 1


def test_wrong_alias_of_an_earlier_release_is_corrected(store: TrackingStore) -> None:
    for before, after in ((None, 1), (1, 2)):
        set_champion(store, NAME, make_promotion(before, after))
    roll_back(store, NAME, "bad", "bob", "1" * 40)
    store.client.set_registered_model_alias(NAME, PREVIOUS, "2")
    complete_pending(store, NAME)
    assert read_aliases(store) == {CHAMPION: 1}


def test_rollback_without_a_previous_champion_is_refused(store: TrackingStore) -> None:
    set_champion(store, NAME, make_promotion(None, 1))
    with pytest.raises(ConvoyError, match="no earlier champion to go back to"):
        roll_back(store, NAME, "why not", "bob", "1" * 40)


@pytest.fixture
def writes_left(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list with the number of writes to MLflow after which the process dies; what dies cleans nothing up."""
    left = [10**9]
    registry = store.client._get_registry_client().store

    for name in REGISTRY_WRITES:
        monkeypatch.setattr(registry, name, limit_writes(getattr(registry, name), left))
    yield left


def test_killed_promotion_is_completed_by_next_run(
    store: TrackingStore, writes_left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_champion(store, NAME, make_promotion(None, 1))
    monkeypatch.setattr(champion, "_is_dead", lambda owner: True)  # the lock's owner has died with it
    before, after, ends = 1, 2, set()
    for writes in range(30):
        writes_left[0] = writes
        try:
            set_champion(store, NAME, make_promotion(before, after))
            died = False
        except SimulatedKill:
            died = True
        writes_left[0] = 10**9
        assert read_aliases(store)[CHAMPION] in (before, after)
        complete_pending(store, NAME)
        moved = read_aliases(store)[CHAMPION] == after
        ends.add((died, moved))
        known = audit_log(store, NAME)
        assert (known["after"].iloc[-1] == after) == moved
        if moved:
            assert read_aliases(store)[PREVIOUS] == before
            before, after = after, before
        assert champion.PENDING_EVENT_TAG not in store.client.get_registered_model(NAME).tags
        assert [model.name for model in store.client.search_registered_models()] == [NAME]  # no lock is left
        if not died:
            break
    assert ends == {(True, False), (True, True), (False, True)}


@given(
    steps=st.lists(st.sampled_from(["promote", "promote", "roll back", "delete"]), max_size=40),
    picks=st.lists(st.integers(0, 99), min_size=40, max_size=40),
)
def test_rollback_target_is_the_last_champion_in_good_standing(steps: list[str], picks: list[int]) -> None:
    line, there, rolled_back_ever, events = [1], {1}, set(), [make_promotion(None, 1)]
    for step, pick in zip(steps, picks, strict=False):
        champion_now = line[-1] if line[-1] in there else None
        expected = next((version for version in line[-2::-1] if version in there), None)
        # an event is in the tags of the versions that it concerns, and is gone with the last of them
        known = [event for event in events if there & {event.before, event.after}]
        assert champion.rollback_target(known, champion_now, there) == expected
        assert not {*champion.rolled_back(known)} & {expected}
        assert {*champion.rolled_back(known)} & there == rolled_back_ever & there
        if step == "promote" and champion_now:
            line.append(len(events) + 1)
            there.add(line[-1])
            events.append(make_promotion(champion_now, line[-1]))
        elif step == "roll back" and expected:
            events.append(PromotionEvent(champion.utc_now(), "rollback", champion_now, expected, "ada", "", "bad"))
            rolled_back_ever |= {champion_now} - {None}
            del line[line.index(expected) + 1 :]
        elif step == "delete":
            there -= {sorted(there)[pick % len(there)]} if len(there) > 1 else set()


# what happens to a registry, and after how many writes the process that does it is killed
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["promote", "promote", "roll back", "roll back", "delete"]),
        st.integers(0, 9),
        st.just(99) | st.just(99) | st.integers(0, 14),
    ),
    min_size=8,
    max_size=12,
).map(lambda steps: [("promote", 0, 99)] * 3 + steps)


@pytest.mark.slow
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=STEPS)
def test_rollbacks_go_back_through_any_history(
    store: TrackingStore, writes_left: list[int], monkeypatch: pytest.MonkeyPatch, steps: list[tuple[str, int, int]]
) -> None:
    monkeypatch.setattr(champion, "_is_dead", lambda owner: True)  # the lock's owner has died with it
    name = store.client.create_registered_model(f"model {uuid.uuid4().hex}").name
    line: list[int] = []  # the champions that were not rolled back, the present one last
    deleted: set[int] = set()
    ever: set[int] = set()  # rolled back

    for step, which, writes in steps:
        there = [version for version in line if version not in deleted]
        is_crowned = bool(line) and line[-1] not in deleted
        expected = next((version for version in line[-2::-1] if version not in deleted), None)
        writes_left[0] = 10**9
        if step == "delete":
            if there:
                deleted.add(there[which % len(there)])
                store.client.delete_model_version(name, str(there[which % len(there)]))
            continue
        if step == "promote":
            made = store.client.create_model_version(name, source=store.experiment.artifact_location)
            event = PromotionEvent(
                champion.utc_now(), "promotion", line[-1] if is_crowned else None, int(made.version), "", "", ""
            )
            if line and not is_crowned:  # nothing is promoted then
                continue
            after: list[int] = [*line, event.after]
            act = functools.partial(set_champion, store, name, event)
        else:
            act = functools.partial(roll_back, store, name, "bad", "bob", "")
            if expected is None:
                with pytest.raises(ConvoyError, match="no earlier champion"):
                    act()
                continue
            after = line[: line.index(expected) + 1]
        writes_left[0] = writes
        with contextlib.suppress(SimulatedKill):
            act()
        writes_left[0] = 10**9
        complete_pending(store, name)
        found = champion.version_of(store, name, CHAMPION)
        if found is not None and int(found.version) == after[-1]:
            ever |= {*line} - {*after}
            line = after
        assert found is None or int(found.version) == line[-1]
        assert not ever & {*line}

        target = next((version for version in line[-2::-1] if version not in deleted), None)
        previous = champion.version_of(store, name, PREVIOUS)
        assert (int(previous.version) if previous else None) == target
        assert champion.PENDING_EVENT_TAG not in store.client.get_registered_model(name).tags


def test_killed_first_promotion_leaves_none_or_the_first(
    store: TrackingStore, writes_left: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(champion, "_is_dead", lambda owner: True)  # the lock's owner has died with it
    for writes in range(30):
        writes_left[0] = writes
        with contextlib.suppress(SimulatedKill):
            set_champion(store, NAME, make_promotion(None, 1))
        writes_left[0] = 10**9
        complete_pending(store, NAME)
        if current_version(store, NAME) is not None:
            break
    assert writes > 1
    assert read_aliases(store) == {CHAMPION: 1}
    store.client.delete_registered_model_alias(NAME, CHAMPION)
    with pytest.raises(ConvoyError, match="had a champion and has none now"):
        current_version(store, NAME)


def test_incomplete_verdict_does_not_count(store: TrackingStore, writes_left: list[int]) -> None:
    for writes in range(5):
        registry.save_verdict(store, NAME, 1, "as it was", "HOLD: too few", "images", "accuracy", 0.5)
        writes_left[0] = writes
        with pytest.raises(SimulatedKill):
            registry.save_verdict(store, NAME, 1, "as it is", "PROMOTE: better", "others", "accuracy", 0.6)
        writes_left[0] = 10**9
        assert registry.cached_verdict(store, NAME, 1, "as it was") == ("HOLD: too few" if writes == 0 else None)
        assert registry.cached_verdict(store, NAME, 1, "as it is") is None
        assert registry.best_ever(store, NAME, {1, 2}, "accuracy") == 1


def test_one_of_two_concurrent_promotions_wins(store: TrackingStore) -> None:
    set_champion(store, NAME, make_promotion(None, 1))
    ends: list[str] = []

    def contend(after: int) -> None:
        try:
            set_champion(dataclasses.replace(store, client=MlflowClient()), NAME, make_promotion(1, after))
            ends.append(f"moved to {after}")
        except ConvoyError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=contend, args=(after,)) for after in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = read_aliases(store)[CHAMPION]
    assert f"moved to {won}" in ends
    assert any("was version 1 when it was compared" in end for end in ends)
    assert audit_log(store, NAME)["after"].tolist() == [1, won]


def test_lock_is_waited_for_and_then_reported(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(champion, "LOCK_TIMEOUT_S", 1)
    with champion.registry_lock(store, NAME), pytest.raises(ConvoyError, match="another process moves the champion"):
        set_champion(store, NAME, make_promotion(None, 1))
    set_champion(store, NAME, make_promotion(None, 1))


def test_lock_of_a_dead_process_is_broken(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 2**30)  # larger than any
    champion._acquire(store, f"{NAME}.moving", f"{champion.socket.gethostname()} {2**30} left")
    monkeypatch.undo()
    set_champion(store, NAME, make_promotion(None, 1))
    assert current_version(store, NAME) == 1


def test_lock_of_another_machine_is_not_broken() -> None:
    assert champion._is_dead(f"{champion.socket.gethostname()} {2**30} left")
    assert not champion._is_dead(f"another-machine {2**30} left")
    assert not champion._is_dead(f"{champion.socket.gethostname()} {champion.os.getpid()} held")


def test_process_with_a_broken_lock_keeps_the_lock_of_the_next(store: TrackingStore) -> None:
    lock = f"{NAME}.moving"
    with champion.registry_lock(store, NAME):
        store.client.delete_registered_model(lock)  # as another process does after a quarter of an hour
        champion._acquire(store, lock, "another-machine 1 held")
    assert store.client.get_registered_model(lock).tags["owner"] == "another-machine 1 held"


def test_alias_set_by_hand_during_a_promotion_is_detected(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_champion(store, NAME, make_promotion(None, 1))
    write = MlflowClient.set_registered_model_alias

    def overtaken(client: MlflowClient, name: str, alias: str, version: str) -> None:
        write(client, name, alias, version)
        if alias == CHAMPION:
            write(client, name, alias, "4")

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", overtaken)
    with pytest.raises(ConvoyError, match="was moved by another at the same moment"):
        set_champion(store, NAME, make_promotion(1, 2))
    monkeypatch.undo()
    complete_pending(store, NAME)
    assert audit_log(store, NAME)["after"].tolist() == [1]


@pytest.mark.parametrize("asked", ["get_model_version_by_alias", "get_registered_model"])
def test_unreachable_registry_is_not_a_missing_champion(
    asked: str, store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def down(*_: object) -> None:
        raise MlflowException("the server is down", error_code=TEMPORARILY_UNAVAILABLE)

    monkeypatch.setattr(MlflowClient, asked, down)
    with pytest.raises(MlflowException, match="the server is down"):
        current_version(store, NAME)


def test_set_evaluations_are_counted_per_image_set(store: TrackingStore) -> None:
    assert registry.count_test_set_uses(store, NAME, 1, "images") == 1  # not written down yet
    for version, seen in ((1, "images"), (2, "images"), (3, "others")):
        registry.save_verdict(store, NAME, version, "key", "HOLD", seen, "accuracy", 0.5)
    assert [registry.count_test_set_uses(store, NAME, version, "images") for version in (1, 2, 3, 4)] == [2, 2, 3, 3]


def test_best_ever_is_the_best_of_those_that_were_champions(store: TrackingStore) -> None:
    for version, accuracy in ((1, 0.5), (2, 0.7), (3, 0.9)):
        registry.save_verdict(store, NAME, version, "key", "HOLD", "images", "accuracy", accuracy)
    assert registry.best_ever(store, NAME, {1, 2, 4}, "accuracy") == 2
    assert registry.best_ever(store, NAME, {4}, "accuracy") is None
