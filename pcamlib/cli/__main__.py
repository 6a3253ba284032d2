"""`python -m pcamlib.cli`, as torchrun and Slurm scripts start it."""

import os
import sys

from pcamlib import provenance
from pcamlib.cli import main

try:
    main()
except SystemExit as end:
    if provenance.world_size() == 1:
        raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(end.code or 0))  # torch's connection threads abort some exits (SIGABRT)
