# Snellius, the Dutch national cluster, with the partitions of the course.
PCAM_CPU_PARTITION=thin_course
PCAM_GPU_PARTITION=gpu_course
PCAM_SCRATCH=${TMPDIR:-/scratch-local/${USER:-$(id -un)}}
pcam_modules() {
    module purge
    module load 2024 Python/3.12.3-GCCcore-13.3.0
}
