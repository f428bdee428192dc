"""Processes that agree, with a real store; here they are threads, but for the end of the process all is as in a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from pretrain_xla.config import ParallelConfig
from pretrain_xla.errors import LOST, AnotherFailed, UserError
from pretrain_xla.runtime import hosts as module
from pretrain_xla.runtime import hosts_watch
from pretrain_xla.runtime.hosts import Hosts, JoinedHosts
from pretrain_xla.runtime.hosts_watch import Failure, end_now
from pretrain_xla.runtime.rendezvous import Meeting, join, pod_meeting, rehearsal_meeting, torchrun_meeting
from pretrain_xla.train.watchdog import HUNG, Watchdog

SILENCE = 1.0
Pod = Callable[[int, Callable[[Hosts], Any]], list[Any]]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Failure]]:
    """Failures for which a process would have been ended by force."""
    failures: list[Failure] = []
    monkeypatch.setattr(hosts_watch, "end_now", lambda failure, quiet=False: failures.append(failure))
    monkeypatch.setattr(hosts_watch, "FOLLOWS", 0.2)
    monkeypatch.setattr(hosts_watch, "WINDS_UP", 0.2)
    yield failures
    for thread in threading.enumerate():
        if thread.name.startswith("hosts"):
            thread.join()  # later it would end the tests


@pytest.fixture
def pod(ended: list[Failure]) -> Pod:
    """Runs a function as each of N processes; returns what each returned or raised, in their order."""
    servers = []

    def run(count: int, function: Callable[[Hosts], Any]) -> list[Any]:
        server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
        servers.append(server)

        def one(index: int) -> Any:
            store = dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=10), wait_for_workers=False)
            hosts = JoinedHosts(store, index, count, count, SILENCE)
            try:
                hosts.devices_are_open()
                with hosts:
                    return function(hosts)
            except Exception as error:
                return error
            finally:
                hosts.close()

        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(one, range(count)))

    return run


def test_they_agree_on_values(pod: Pod) -> None:
    def agree(hosts: Hosts) -> list[Any]:
        values = [
            hosts.gather([hosts.index, {"a": None}], "a list"),
            hosts.gather(hosts.index, "a list"),  # again, with the same words
            hosts.first(f"of {hosts.index}", "a text"),
            hosts.equal(7, "seven"),
            hosts.equal(hosts.index, "indices"),
            hosts.minimum(10 - hosts.index, "a number"),
            hosts.is_first,
        ]
        hosts.barrier("a point")
        return values

    for index, values in enumerate(pod(3, agree)):
        lists = [[number, {"a": None}] for number in range(3)]
        assert values == [lists, [0, 1, 2], "of 0", True, False, 8, index == 0]


def test_one_process_agrees_with_itself() -> None:
    hosts = join(None, SILENCE)
    assert hosts.gather(1, "x") == [1]
    assert hosts.first(1, "x") == hosts.minimum(1, "x") == 1
    assert hosts.equal(1, "x")
    assert not hosts.stops_here()
    hosts.request_stop(signal.SIGTERM)
    assert hosts.stops_here()
    assert hosts.stopped_by == signal.SIGTERM


def test_other_threads_agree_beside_the_main_one(pod: Pod) -> None:
    def agree(hosts: Hosts) -> tuple[list[Any], list[Any]]:
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(lambda: [time.sleep(0.1), hosts.gather(hosts.index, "written")][1])
            now = [hosts.gather(-hosts.index, "read") for _ in range(20)]
            return now[-1], later.result()

    assert pod(2, agree) == [([0, -1], [0, 1])] * 2


@pytest.mark.parametrize("who", [0, 1])
def test_all_stop_at_the_same_point(pod: Pod, who: int) -> None:
    """One is fast and one is slow; the request comes from either of them, and none passes the point of the others."""

    def train(hosts: Hosts) -> tuple[int, int | None]:
        for step in range(10_000):
            if step == 20 and hosts.index == who:
                hosts.request_stop(signal.SIGUSR1)
            if hosts.stops_here():
                return step, hosts.stopped_by
            time.sleep(0.01 if hosts.index else 0.001)
        raise AssertionError

    first, second = pod(2, train)
    assert first == second
    assert first[0] >= 20
    assert first[1] == signal.SIGUSR1


def test_a_request_after_the_last_point_holds_nobody(pod: Pod) -> None:
    def train(hosts: Hosts) -> list[bool]:
        points = [hosts.stops_here() for _ in range(3)]
        hosts.request_stop(signal.SIGTERM)
        return points

    assert pod(2, train) == [[False] * 3] * 2


def test_one_fails_and_all_know_why(pod: Pod, ended: list[Failure]) -> None:
    def work(hosts: Hosts) -> None:
        if hosts.index == 1:
            raise UserError("the disk is full")
        hosts.barrier("the end of the step", seconds=30)

    began = time.monotonic()
    told, own, also_told = pod(3, work)
    assert time.monotonic() - began < 5
    assert str(own) == "the disk is full"
    assert str(told) == str(also_told)
    assert str(told).startswith("process 1 of 3 (pid ")
    assert str(told).endswith("): the disk is full")
    assert isinstance(told, AnotherFailed)
    assert told.status == 2


def test_one_that_does_not_come_is_named(pod: Pod) -> None:
    def work(hosts: Hosts) -> None:
        if hosts.index == 0:
            hosts.barrier("the meeting", seconds=0.3)
        else:
            time.sleep(1)
            hosts.stops_here()

    waited, late = pod(2, work)
    assert "process 1 of 2 (pid " in str(waited)
    assert "did not come to the meeting within 0 s" in str(waited)
    assert str(late) == str(waited)
    assert late.status == LOST


def test_the_first_says_for_whom_it_waits(
    pod: Pod, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "SAYS", 0.2)

    def work(hosts: Hosts) -> None:
        time.sleep(0.6 * hosts.index)
        hosts.barrier("the meeting", seconds=30)

    assert pod(3, work) == [None] * 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "to come to the meeting" in line]
    assert line.startswith("note: waiting for process 1 of 3 (pid ")
    assert line.endswith("to come to the meeting, for up to 30 s")


def test_a_hang_is_told_to_the_others(
    pod: Pod, ended: list[Failure], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One of them learns why it ends; the other hangs as well, and its watch prints where."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)

    def work(hosts: Hosts) -> None:
        if hosts.index == 1:
            watchdog = Watchdog(0.1, lambda: "step 7", hosts)
            monkeypatch.setattr(watchdog._left, "wait", lambda _tick: bool(statuses))
            watchdog._last -= 1
            watchdog._watch(0.1)
        elif hosts.index == 2:
            deadline = time.monotonic() + 10
            while not ended and time.monotonic() < deadline:
                time.sleep(0.05)
        hosts.barrier("the end of the step", seconds=30)

    told, *_ = pod(3, work)
    assert statuses == [HUNG]
    assert isinstance(told, AnotherFailed)
    assert str(told).startswith("process 1 of 3 (pid ")
    assert str(told).endswith("): step 7 has made no progress for 0.1 s (--hang-timeout)")
    assert told.status == HUNG
    assert ended[0].stacks
    capfd.readouterr()
    end_now(ended[0])  # without its last line, which ends the process
    errors = capfd.readouterr().err
    assert errors.startswith(f"error: {told}\n")
    assert "in test_a_hang_is_told_to_the_others" in errors


def test_a_main_thread_that_hangs_is_ended(pod: Pod, ended: list[Failure]) -> None:
    """In a collective whose other side is gone, the main thread never comes back."""

    def work(hosts: Hosts) -> None:
        if hosts.index == 1:
            raise ZeroDivisionError("division by zero")
        deadline = time.monotonic() + 10
        while not ended and time.monotonic() < deadline:
            time.sleep(0.05)

    pod(2, work)
    assert {failure.status for failure in ended} == {1}
    assert "ZeroDivisionError: division by zero" in ended[0].message


@pytest.mark.usefixtures("ended")
def test_a_second_process_with_the_same_number_is_refused() -> None:
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=10), wait_for_workers=False)
    first = JoinedHosts(server, 0, 1, 1, SILENCE)
    server.set("joined/0", "pid 1 on a.host")  # an earlier run's
    with pytest.raises(UserError, match=r"process 0 of 1 is there already \(pid 1 on a.host\)"):
        JoinedHosts(server.clone(), 0, 1, 1, SILENCE)
    first.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "hosts"]


def test_where_they_meet() -> None:
    variables = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "a.host",
        "MASTER_PORT": "29500",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert torchrun_meeting(variables) == Meeting(1, 4, 2, "a.host", 29500, False, "hosts/attempt_0")
    agent = variables | {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert torchrun_meeting(agent) == Meeting(0, 4, 2, "a.host", 29500, False, "hosts/attempt_2")
    assert torchrun_meeting({}) is None
    small = {"PRETRAIN_XLA_REHEARSAL": "0/2@127.0.0.1:12355", "PJRT_DEVICE": "CPU"}
    assert rehearsal_meeting(small) == Meeting(0, 2, 2, "127.0.0.1", 12355, True)
    with pytest.raises(UserError, match="would train a model of its own"):
        rehearsal_meeting(small | {"PJRT_DEVICE": "TPU"})
    for wrong in ("2/2@127.0.0.1:1", "0/2", "0/2@127.0.0.1"):
        with pytest.raises(UserError, match="is not INDEX/COUNT@ADDRESS:PORT"):
            rehearsal_meeting(small | {"PRETRAIN_XLA_REHEARSAL": wrong})


def test_where_the_hosts_of_a_pod_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pod_meeting(["localhost"], 0, environment={}) is None
    assert pod_meeting(["10.0.0.1", "10.0.0.2"], 1, environment={}) == Meeting(1, 2, 2, "10.0.0.1", 12355, False)
    elsewhere = {"MASTER_ADDR": "a.host", "MASTER_PORT": "7"}
    assert pod_meeting(["h0", "h1"], 0, 4, 0, elsewhere) == Meeting(0, 8, 2, "a.host", 7, True)
    assert pod_meeting(["h0", "h1"], 1, 4, 2, elsewhere) == Meeting(6, 8, 2, "a.host", 7, False)
    meeting = pytest.importorskip("pretrain_xla.runtime.xla.meeting")
    variables = {"PJRT_DEVICE": "TPU", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b,c"}
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert meeting.find_meeting(ParallelConfig()) == Meeting(1, 3, 3, "a", 12355, False)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert meeting.find_meeting(ParallelConfig()) is None, (
        "a notebook's variables describe a pod that it is not part of"
    )
