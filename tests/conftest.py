"""One thread for all tests: the models are tiny, and threads that wait for a busy core make them many times slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
