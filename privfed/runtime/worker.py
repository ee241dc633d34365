"""The process of an app: `python -m privfed.runtime.worker FD`, with a socket to whoever launched it.

It is told what to load and what it may do, confines itself, imports the app, and then answers. A client app answers
"execute" packets one after the other; a server app runs once and reaches its Grid through the socket. When the other
side of the socket is gone the process ends at once, and with it every process the app has started. Of an exception of
a client app only the class leaves; its text goes to the log this process writes to.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from privfed.failpoint import VARIABLE, around, take_up
from privfed.runtime.confinement import Limits, confine

if TYPE_CHECKING:
    from privfed.context import Context
    from privfed.runtime.channel import Channel, Packet

MAX_NAME = 80


def main() -> None:
    """Serve the socket whose descriptor is the one argument."""
    stream = socket.socket(fileno=int(sys.argv[1]))
    limits = Limits.from_head(_first_line(stream))
    try:
        achieved = confine(limits)  # before any other import: it needs a process with one thread
    except Exception as fault:  # noqa: BLE001 - told to the launcher, who decides
        achieved = f"refused: {fault}"
    from privfed.mapped import work_in
    from privfed.runtime.channel import Channel

    home = Path.cwd()  # its own folder: what is large is in files there, and not in memory
    work_in(home)
    channel = Channel(stream, spool=home, trusting=True)
    if achieved.startswith("refused"):
        _send(channel, {"op": "refused", "text": achieved})
        return
    inbox: queue.SimpleQueue[Packet] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, inbox), name="privfed-channel", daemon=True).start()
    start = inbox.get()
    take_up("server-app" if start.head["role"] == "server" else "client-app")
    os.environ.pop(VARIABLE, None)
    _send(channel, {"op": "confined", "text": achieved, "process": os.getpid()})
    try:
        if start.head["role"] == "client":
            _serve_client(channel, inbox, Path(start.head["app"]))
        else:
            _serve_server(channel, inbox, start)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        channel.close()
        os.killpg(0, signal.SIGKILL)  # what the app has started ends with it


def _first_line(stream: socket.socket) -> Mapping[str, object]:
    """Read the limits, which come before the first packet as one line: its decoder needs numpy, which has threads."""
    import json

    line = bytearray()
    while not line.endswith(b"\n"):
        byte = stream.recv(1)
        if not byte or len(line) > 1 << 16:
            sys.exit("the launcher is gone")
        line += byte
    return cast("Mapping[str, object]", json.loads(line))


def _listen(channel: Channel, inbox: queue.SimpleQueue[Packet]) -> None:
    from privfed.runtime.channel import ChannelError

    with contextlib.suppress(ChannelError):
        while True:
            inbox.put(channel.receive())
    os.killpg(0, signal.SIGKILL)


def _send(channel: Channel, head: dict[str, Any], values: tuple[Any, ...] = ()) -> None:
    from privfed.runtime.channel import Packet

    channel.send(Packet(head, values))


def class_name(fault: BaseException) -> str:
    """Return the class of an exception as it may leave the process: an identifier, and not a long one."""
    name = type(fault).__name__
    return name if name.isidentifier() and name.isascii() and len(name) <= MAX_NAME else "Exception"


def _failure(fault: BaseException) -> str:
    traceback.print_exception(fault, file=sys.stderr)
    sys.stderr.flush()
    return class_name(fault)


def _serve_client(channel: Channel, inbox: queue.SimpleQueue[Packet], folder: Path) -> None:
    from privfed.runtime.app_folder import AppFolder

    try:
        app = AppFolder.open(folder).load_client()
    except BaseException as fault:  # noqa: BLE001 - SystemExit at import is a failure of the app, too
        # The cause of an AppError is what the app raised.
        _send(channel, {"op": "unloadable", "kind": _failure(fault.__cause__ or fault)})
        return
    with around("ready"):
        _send(channel, {"op": "ready"})
    while True:
        packet = inbox.get()
        if packet.head.get("tell-taken"):  # an older launcher does not know it
            with around("taken"):  # from here on its end is the app's doing
                _send(channel, {"op": "taken"})
        try:
            head, values = execute(app, packet)
        except BaseException as fault:  # noqa: BLE001 - SystemExit in a handler must not end the worker
            head, values = {"op": "error", "kind": _failure(fault)}, ()
        try:
            with around("reply"):
                _send(channel, head, values)
        except (ValueError, TypeError) as fault:  # a reply that cannot travel
            _send(channel, {"op": "error", "kind": _failure(fault)})


def execute(app: Any, packet: Packet) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Run a client app on an "execute" packet; return the answer's head and values."""
    from privfed.message import Message
    from privfed.runtime.capsule import read_context, state_of

    message, context = packet.message(0), read_context(packet)
    reply = app(message, context)
    if not isinstance(reply, Message):
        raise TypeError(f"the handler returned {type(reply).__name__}, not a Message")
    return {"op": "reply"}, (reply, state_of(context))


def _serve_server(channel: Channel, inbox: queue.SimpleQueue[Packet], start: Packet) -> None:
    from privfed.errors import RunFailed, RunStopped
    from privfed.runtime.app_folder import AppFolder
    from privfed.runtime.capsule import read_context
    from privfed.runtime.disk import disk_fault
    from privfed.runtime.remote_grid import Caller, RemoteGrid, as_plain

    context: Context = read_context(start)
    caller = Caller(channel)
    threading.Thread(target=caller.dispatch, args=(inbox,), name="privfed-answers", daemon=True).start()
    head: dict[str, Any]
    try:
        app = AppFolder.open(Path(start.head["app"])).load_server()
        grid = RemoteGrid(caller, context, start.head)
        result, found = as_plain(app(grid, context))
        if not found:
            sys.stderr.write("what main returned is no plain data: it stays in the app's process\n")
    except (RunFailed, RunStopped) as fault:
        text = fault.reason if isinstance(fault, RunFailed) else str(fault)
        head = {"op": "failed", "kind": "stopped" if isinstance(fault, RunStopped) else "failed", "text": text}
    except KeyboardInterrupt:
        head = {"op": "failed", "kind": "stopped", "text": "interrupted"}
    except OSError as fault:
        kind = "disk" if disk_fault(fault) else "raised"
        head = {"op": "failed", "kind": kind, "name": _failure(fault), "text": str(fault)[:2000], "errno": fault.errno}
    except BaseException as fault:  # noqa: BLE001 - SystemExit is a failure of the app, too
        # A server app belongs to whoever started the run: its text is for them.
        head = {"op": "failed", "kind": "raised", "name": _failure(fault), "text": str(fault)[:2000]}
    else:
        head = {"op": "result", "value": result}
    caller.finish(head, context)


if __name__ == "__main__":
    main()
