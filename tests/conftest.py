import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

# As the command line does it, before torch is imported: see cli/__init__.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Processes of pytest-xdist share the cores; each takes one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A third of a toy run is waiting for the disk, where a memory has none.
_MEMORY = "/dev/shm"
if Path(_MEMORY).is_dir() and shutil.disk_usage(_MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", _MEMORY)

# Where it is noted which run has a server.
if sys.platform != "win32":
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="bayesian-merger-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
