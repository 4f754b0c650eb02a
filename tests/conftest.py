import os

# As the command line does it, before torch is imported: see cli.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
