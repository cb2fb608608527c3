"""One thread per test process, set before torch is imported: two under contention are far slower, and bits depend on it."""

import os

from hypothesis import settings

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

settings.register_profile("merit", deadline=None)  # no test may fail by the clock
settings.load_profile("merit")
