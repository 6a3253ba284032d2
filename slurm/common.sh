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

# Notice to leave: USR1 comes before the time limit, TERM before the end; both are handed on to what runs.
pcam_told='' pcam_child=''
pcam_hand_on() {
    pcam_told=$1
    pcam_say "told to leave ($1)"
    [[ -z $pcam_child ]] || kill -s "$1" "$pcam_child" 2>/dev/null || true
}
trap 'pcam_hand_on USR1' USR1
trap 'pcam_hand_on TERM' TERM

# Run a command and wait until it is gone; returns its exit code, or 75 where notice came before it began.
pcam_run() {
    local code=0
    [[ -z $pcam_told ]] || return 75
    "$@" &
    pcam_child=$!
    wait "$pcam_child" || true
    while kill -0 "$pcam_child" 2>/dev/null; do  # a trapped signal ends `wait`, not the command
        wait "$pcam_child" || true
    done
    wait "$pcam_child" || code=$?
    pcam_child=''
    return "$code"
}

# Put this job back into the queue if it was told of its time limit before its command ($1: exit code) was done, and
# saved anything ($2: what it saved last before, $3: now): otherwise the next start would fare no better.
pcam_requeue() {
    [[ $pcam_told == USR1 && $1 -ne 0 ]] || return 0
    if [[ $2 == "$3" ]]; then
        pcam_say "told to leave before anything was saved; not put back into the queue: ask for a longer --time" >&2
        return 0
    fi
    pcam_say "saved before the time limit; back into the queue"
    trap 'exit 0' TERM  # with which Slurm ends this start
    if scontrol requeue "$SLURM_JOB_ID"; then
        local end=$((SECONDS + 60))
        while ((SECONDS < end)); do  # TERM reaches each `sleep` too, perhaps before it reaches us
            sleep 1 &
            wait "$!" || true
        done
    fi
    pcam_say "Slurm did not take it back: submit it again, and it goes on" >&2
}
