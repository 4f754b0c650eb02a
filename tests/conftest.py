import os

# As the command line does it, before torch is imported: see cli/__init__.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
