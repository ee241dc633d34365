"""What holds for every test."""

from __future__ import annotations

import signal

from privfed.runtime.credentials import require_tls_1_3

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that press Ctrl-C on a child
# would press in vain. A handler, unlike an ignored signal, is reset to the default in a child.
signal.signal(signal.SIGINT, signal.default_int_handler)

# gRPC reads this once, before whatever test uses it first.
require_tls_1_3()
