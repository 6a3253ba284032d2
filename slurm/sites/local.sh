# A Slurm on this machine: the one that tests/slurm/cluster.py starts.
PCAM_CPU_PARTITION=thin_course
PCAM_GPU_PARTITION=gpu_course
PCAM_SCRATCH=${TMPDIR:-/tmp}
pcam_modules() { :; }
