"""Extraction as tests run it: two batches at a time with one thread each, on any machine.

The default on a CPU, two threads per batch, takes twenty times as long where cores are busy: the
two wait for each other at every layer.
"""

ONE_THREAD_PER_BATCH = {"batch_sz": 8, "streams": 2, "threads": 1}

# extract_features.py for a process of its own (`python -c`).
EXTRACT = f"""
import sys
sys.path.insert(0, "pre-processing")
import extract_features
from features import extraction
extraction.default_parallelism = lambda *_: {ONE_THREAD_PER_BATCH}
extract_features.run_main(extract_features.main)
"""
