"""An S3 server as a process of its own, on loopback; one for all tests of a session."""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

_numbers = itertools.count(1)


@functools.cache
def endpoint() -> str:
    """Start the server; return its address, and let this process find it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    atexit.register(process.kill)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.1)
    told = {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "secret-word", "REGION": "us-east-1"}
    os.environ.update({f"AWS_{name}": value for name, value in told.items()})
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    return address


def bucket() -> str:
    """Return the URL of a new bucket."""
    address, name = endpoint(), f"test-{os.getpid()}-{next(_numbers)}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/{name}", method="PUT"), timeout=10).close()
    return f"s3://{name}/federation"
