"""`python -m pcamlib.cli`, as torchrun and Slurm scripts start it."""

from pcamlib.cli import main

main()
