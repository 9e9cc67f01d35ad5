"""One thread for all tests: the models are tiny, and threads that wait for a busy core make them many times slower.

And no GPU: what is compared bit for bit is computed on a CPU.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
