# What every job of this project does first; sourced, from the repository root, by the scripts beside it.
#   PCAM_SITE   name of a file in slurm/sites/; `pcam submit` sets it

pcam_say() { echo "$(date +%T) ${SLURM_JOB_NAME:-job}: $*"; }

PCAM_SITE=${PCAM_SITE:-local}
if [[ ! -r slurm/sites/$PCAM_SITE.sh ]]; then
    pcam_say "unknown site '$PCAM_SITE'; there are: $(cd slurm/sites && echo *.sh)" >&2
    exit 2
fi
source "slurm/sites/$PCAM_SITE.sh"
pcam_modules
if [[ ! -x .venv/bin/pcam ]]; then
    pcam_say "no .venv in $PWD: run 'make .venv' there, on the login node" >&2
    exit 2
fi
export PCAM_SITE PCAM_SCRATCH PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME  # modules set them
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
pcam_say "job ${SLURM_JOB_ID:-none} on ${SLURMD_NODENAME:-$(hostname)}, $OMP_NUM_THREADS threads, start ${SLURM_RESTART_COUNT:-0}"

# Run a command, hand USR1 and TERM on to it, and wait until it is gone; returns its exit code.
pcam_run() {
    "$@" &
    local child=$! code=0
    trap 'kill -USR1 "$child" 2>/dev/null' USR1
    trap 'kill -TERM "$child" 2>/dev/null' TERM
    while :; do
        code=0
        wait "$child" || code=$?
        kill -0 "$child" 2>/dev/null || break  # a trapped signal ends `wait`, not the command
    done
    trap - USR1 TERM
    return "$code"
}
