"""What people submit to Slurm."""
