"""The head of a journal: what it rests on, in one quote block."""

from __future__ import annotations

from collections.abc import Sequence

from pcamlib.journal.claims import Record, show


def head(made: Sequence[Record]) -> str:
    """Synthetic or real data, fingerprints, commit, date, hardware and jobs of at least one record; how to remake."""
    origins = [record.provenance for record in made]
    synthetic = [record.notebook for record in made if record.synthetic]
    lines = []
    if synthetic:
        scope = "" if len(synthetic) == len(made) else f" in {', '.join(synthetic)}"
        lines.append(f"**SYNTHETIC DATA{scope}.** Generated patches, not tissue: no score here speaks of patients.")
    data = {f"{split} `{mark[:12]}`": None for origin in origins for split, mark in origin["data"].items()}
    machines = [
        f"{o['machine']['device_name']}, {show(o['machine']['threads'])} threads, torch {o['torch']}" for o in origins
    ]
    jobs = dict.fromkeys(record.job for record in made if record.job)
    last = max(record.executed for record in made)
    lines += [
        f"Evidence of {len(made)} notebooks, executed up to {last[:16].replace('T', ' ')} UTC.",
        f"Data: {', '.join(data)}.",
        f"Code: {'; '.join(dict.fromkeys(record.commit for record in made))}.",
        f"Hardware: {'; '.join(dict.fromkeys(machines))}.",
        *([f"Slurm: {'; '.join(jobs)}."] if jobs else []),
        "`make journal` runs the notebooks whose sources or data changed and writes this page again; "
        "answers are changed in `journal/`, not here.",
    ]
    return "\n>\n".join(f"> {line}" for line in lines)
