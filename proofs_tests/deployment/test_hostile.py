"""Hostile peers at every listener: refused with a precise error, nothing changes, and the service goes on."""

from __future__ import annotations

import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

from privfed import ArrayRecord, Message, MetricRecord, RecordDict
from privfed.runtime.bundle import build
from privfed.runtime.control import ControlClient, Listing, Submission
from privfed.runtime.fleet import FleetClient, FleetOptions, Task
from privfed.runtime.frame import (
    Answer,
    Hello,
    Progress,
    RunQuery,
    Verdict,
    Want,
    chunk,
    pack,
    parcel,
    unpack,
)
from privfed.runtime.handshake import NetworkError, Refused, greeting
from proofs_tests.deployment.hostile_crowd import growths
from proofs_tests.deployment.hostile_wire import PREFACE, SEEDS
from proofs_tests.deployment.local_link import EXAMPLES, LocalLink, nodes_at
from proofs_tests.deployment.waiting import eventually

CALM = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}
UNARY = ["/privfed.Fleet/Answer", "/privfed.Fleet/Run", "/privfed.Control/Resume", "/privfed.Control/Stop"]
UNARY += [f"/privfed.Control/{name}" for name in ("Show", "Runs", "Nodes", "Node", "Results")]
STREAMING = ["/privfed.Fleet/Download", "/privfed.Control/Follow", "/privfed.Control/Result"]
RECEIVING = ["/privfed.Fleet/Upload", "/privfed.Control/Submit"]
CONVERSING = ["/privfed.Fleet/Session", "/privfed.Fleet/Send", "/privfed.Fleet/Fetch"]


@pytest.fixture
def link(tmp_path: Path) -> Iterator[LocalLink]:
    with LocalLink(tmp_path) as link:
        yield link


def is_well(link: LocalLink) -> bool:
    """Whether a user is served, fast."""
    began = time.monotonic()
    with ControlClient(link.control) as control:
        control.runs()
    return time.monotonic() - began < 2.0


def call(address: str, method: str, requests: list[bytes], metadata: object = None) -> grpc.StatusCode:
    """Call a method with any bytes; return the status."""
    with grpc.insecure_channel(address) as channel:
        return call_on(channel, method, requests, metadata)


def call_on(channel: grpc.Channel, method: str, requests: list[bytes], metadata: object = None) -> grpc.StatusCode:
    told = greeting(node_id=1) if metadata is None else metadata
    try:
        if method in UNARY:
            channel.unary_unary(method)(requests[0], metadata=told, timeout=20)
        elif method in STREAMING:
            list(channel.unary_stream(method)(requests[0], metadata=told, timeout=20))
        elif method in RECEIVING:
            channel.stream_unary(method)(iter(requests), metadata=told, timeout=20)
        else:
            list(channel.stream_stream(method)(iter(requests), metadata=told, timeout=20))
    except grpc.RpcError as fault:
        assert "Traceback" not in (fault.details() or "")
        return fault.code()
    return grpc.StatusCode.OK


def address_of(link: LocalLink, method: str) -> str:
    return link.fleet if "Fleet" in method else link.control


def test_random_bytes_at_every_port_change_nothing(link: LocalLink) -> None:
    rng = random.Random(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for address in link.link.addresses.values():
        host, _, port = address.rpartition(":")
        for trial in range(100):
            with socket.create_connection((host, int(port))) as stream:
                if trial % 2:
                    stream.sendall(PREFACE)
                try:
                    stream.sendall(rng.randbytes(rng.randrange(5000)))
                except OSError:
                    continue
    assert is_well(link)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_malformed_frames_at_every_method_are_refused_by_name(link: LocalLink) -> None:
    rng = random.Random(2)
    codes: set[grpc.StatusCode] = set()
    with (
        nodes_at(link.fleet, 1),
        grpc.insecure_channel(link.fleet) as fleet,
        grpc.insecure_channel(link.control) as users,
    ):
        eventually(lambda: len(link.link.dispatcher.sessions) == 1)
        for method in UNARY + STREAMING + RECEIVING + CONVERSING[1:]:
            channel = fleet if "Fleet" in method else users
            for _ in range(60):
                raw = bytearray(pack(rng.choice(SEEDS)))
                for _ in range(rng.randrange(3)):
                    raw[rng.randrange(len(raw))] = rng.randrange(256)
                requests = [bytes(raw[: rng.randrange(len(raw) + 1)]) for _ in range(2)]
                codes.add(call_on(channel, method, requests))
    assert codes <= CALM | {grpc.StatusCode.OK}
    assert is_well(link)


def test_a_session_that_does_not_introduce_itself_is_refused(link: LocalLink) -> None:
    for request in (b"", b"\xff" * 100, pack(RunQuery(run_id=1)), pack(Hello(slots=0)), pack(Hello(slots=10_000))):
        assert call(link.fleet, CONVERSING[0], [request]) == grpc.StatusCode.INVALID_ARGUMENT
    assert not link.link.dispatcher.sessions


def test_nothing_larger_than_a_frame_is_read(link: LocalLink) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for method in UNARY + STREAMING + RECEIVING + CONVERSING:
        code = call(address_of(link, method), method, [bytes(5 << 20)])
        assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE), method
    assert is_well(link)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("method", UNARY + STREAMING + RECEIVING + CONVERSING)
def test_a_peer_of_another_version_is_told_both(link: LocalLink, method: str) -> None:
    address = address_of(link, method)
    assert call(address, method, [b""], ()) == grpc.StatusCode.FAILED_PRECONDITION
    assert call(address, method, [b""], (("privfed-protocol", "9"),)) == grpc.StatusCode.FAILED_PRECONDITION
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        told = greeting(7, 9, "9.0.0", node_id=1)
        list(channel.stream_stream(method)(iter([b""]), metadata=told, timeout=10))
    assert "privfed 9.0.0) speaks protocol 7 to 9, this side (privfed 0.1.0) 1 to 2" in caught.value.details()


def test_a_newer_peer_that_still_speaks_our_version_is_served(link: LocalLink) -> None:
    newer = greeting(1, 2, "0.2.0", node_id=1)
    assert call(link.control, "/privfed.Control/Runs", [pack(Listing(limit=1))], newer) == grpc.StatusCode.OK


def test_a_node_refuses_a_superlink_of_another_version_for_good() -> None:
    def serve(request: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.send_initial_metadata(greeting(8, 9, "9.0.0"))
        yield b""

    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {"Session": grpc.stream_stream_rpc_method_handler(serve)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("privfed.Fleet", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = FleetClient(f"127.0.0.1:{port}", None, 1)
    with pytest.raises(Refused, match=r"privfed 9\.0\.0\) speaks protocol 8 to 9"):
        client.receive(10)
    client.close()
    server.stop(None).wait()


def test_an_app_that_is_none_is_refused(link: LocalLink) -> None:
    with ControlClient(link.control) as control:
        for archive in (b"x", b"PK\x03\x04" + bytes(200), bytes(3 << 20)):
            with pytest.raises(NetworkError, match="the bundle"):
                control.submit(Submission(archive, {}))
        good = EXAMPLES / "minimal"
        with pytest.raises(NetworkError, match="did you mean 'num-rounds'"):
            control.submit(Submission(build(good), {"num-round": "3"}))
        with pytest.raises(NetworkError, match="at least one node"):
            control.submit(Submission(build(good), {}, nodes=0))
        assert control.runs() == ()


def hold_tasks(link: LocalLink, count: int) -> tuple[str, list[FleetClient], list[Task]]:
    """Start a run and return its name, and clients that have received their first task."""
    clients = [FleetClient(link.fleet, None, node, FleetOptions()) for node in range(1, count + 1)]
    name = link.submit(EXAMPLES / "minimal", count, num_rounds=2)
    tasks = [client.receive(20) for client in clients]
    return name, clients, [task for task in tasks if task is not None]


def answer_to(task: Task, value: float = 1.0) -> Message:
    arrays = ArrayRecord([np.full(1, float(value))])
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=task.message)


def test_a_node_can_neither_answer_for_another_nor_twice(link: LocalLink) -> None:
    name, clients, tasks = hold_tasks(link, 2)
    first, second = clients
    with pytest.raises(NetworkError, match="node 2 answers for another node"):
        second.reply(tasks[0].token, answer_to(tasks[0], 1e9))
    with pytest.raises(NetworkError, match="the reply names task"):
        second.reply(tasks[1].token, answer_to(tasks[1]).with_metadata(reply_to_message_id="other"))
    with pytest.raises(NetworkError, match="the reply names source 1, the task 2"):
        second.reply(tasks[1].token, answer_to(tasks[1]).with_metadata(src_node_id=1))
    assert first.reply("f" * 32, answer_to(tasks[0])) is False
    assert first.reply(tasks[0].token, answer_to(tasks[0], 2.0)) is True
    assert first.reply(tasks[0].token, answer_to(tasks[0], 7.0)) is True  # counted before; what it says now is not
    assert second.reply(tasks[1].token, answer_to(tasks[1], 4.0)) is True
    eventually(lambda: link.folder(name).recorded_status.round == 1)
    found = link.folder(name).restore()
    assert found is not None and found.arrays.to_numpy_ndarrays()[0] == [3.0]
    for client in clients:
        client.close()


def test_recorded_messages_replayed_change_nothing(link: LocalLink) -> None:
    """Every answer of a run, sent again after each of them: no other model, and nobody is counted twice."""
    answer = "/privfed.Fleet/Answer"
    recorded: list[bytes] = []
    name, clients, tasks = hold_tasks(link, 2)
    with grpc.insecure_channel(link.fleet) as channel:
        for number in range(2):
            for node, task in enumerate(tasks, 1):
                recorded.append(pack(Answer(token=task.token, parcel=parcel(answer_to(task, 10 * number + node))[0])))
                for raw in reversed(recorded):
                    for claimed in (1, 2):
                        try:
                            channel.unary_unary(answer)(raw, metadata=greeting(node_id=claimed), timeout=10)
                        except grpc.RpcError as fault:
                            assert fault.code() == grpc.StatusCode.PERMISSION_DENIED
            if number == 0:
                tasks = [task for client in clients if (task := client.receive(20)) is not None]
        end = link.wait(name)
        assert (end.state, end.reason, end.round) == ("completed", "", 2)
        found = link.folder(name).restore()
        assert found is not None and found.arrays.to_numpy_ndarrays()[0] == [11.5]
        assert link.link.fleet.answers == 4
        for raw in recorded:
            assert unpack(channel.unary_unary(answer)(raw, metadata=greeting(node_id=1)), Verdict).counted is False
    for client in clients:
        client.close()


def test_large_buffers_go_only_to_and_from_whom_they_are_for(link: LocalLink) -> None:
    _, clients, _ = hold_tasks(link, 2)
    other = [pack(Want(parts=(Progress(digest=bytes(32), size=0),)))]
    upload = [chunk(bytes(32), 0, 5, b"12345")]
    for method in ("Download", "Fetch"):
        assert call(link.fleet, f"/privfed.Fleet/{method}", other) == grpc.StatusCode.NOT_FOUND
    for method in ("Upload", "Send"):
        assert call(link.fleet, f"/privfed.Fleet/{method}", upload) == grpc.StatusCode.OUT_OF_RANGE
    assert call(link.fleet, "/privfed.Fleet/Run", [pack(RunQuery(run_id=1))]) == grpc.StatusCode.NOT_FOUND
    assert not list((link.options.home / "incoming").glob("*/*"))
    stranger = greeting(node_id=77)
    for method in ("Answer", "Run", "Download", "Upload", "Fetch", "Send"):
        assert call(link.fleet, f"/privfed.Fleet/{method}", [b""], stranger) == grpc.StatusCode.UNAVAILABLE
    for client in clients:
        client.close()


def test_a_node_that_comes_twice_is_one_node(link: LocalLink) -> None:
    statuses: list[str] = []
    first = FleetClient(link.fleet, None, 1, FleetOptions(on_status=statuses.append))
    eventually(lambda: "connected to insecure as node 1" in statuses)
    second = FleetClient(link.fleet, None, 1)
    eventually(lambda: "the SuperLink closed the connection" in statuses)
    assert len(link.link.dispatcher.sessions) == 1
    first.close()
    eventually(lambda: len(link.link.dispatcher.sessions) == 1)
    second.close()
    eventually(lambda: not link.link.dispatcher.sessions)


def test_half_open_connections_do_not_stop_the_others(link: LocalLink) -> None:
    host, _, port = link.fleet.rpartition(":")
    streams = [socket.create_connection((host, int(port))) for _ in range(200)]
    for stream in streams[::2]:
        stream.sendall(b"PRI * HTT")
    began = threading.active_count()
    assert is_well(link)
    with nodes_at(link.fleet, 2):
        assert link.wait(link.submit(EXAMPLES / "minimal", 2, num_rounds=1)).state == "completed"
    assert threading.active_count() <= began + 8
    for stream in streams:
        stream.close()


@pytest.mark.long
def test_two_hundred_refused_peers_at_once_take_little_memory(tmp_path: Path) -> None:
    assert max(growths(tmp_path, 200).values()) < 64 << 10
