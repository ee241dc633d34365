"""Import this before anything that loads numpy: one thread, so that CPU time is the time of one core."""

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
