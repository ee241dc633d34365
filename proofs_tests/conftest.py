"""What holds for every test."""

from __future__ import annotations

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that press Ctrl-C on a child
# would press in vain. A handler, unlike an ignored signal, is reset to the default in a child.
signal.signal(signal.SIGINT, signal.default_int_handler)
