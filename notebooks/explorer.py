"""The error explorer as a page of its own, on the newest run that predicted the validation patches.

    make explore                                synthetic patches, runs/
    PCAM_DATA=DIR PCAM_RUNS=DIR make explore    the official files in a folder, and the runs below another

Where there is no such run, a small network is trained first (a minute). A slice saved on the page is kept in
journal/slices.yaml, and the next run of notebook 06 measures it.
"""

import os
from pathlib import Path

from IPython.display import display

from pcamlib import config
from pcamlib.data.folder import data_folder
from pcamlib.data.patches import open_split
from pcamlib.experiments import embedding, explorer, features, saved, study
from pcamlib.sources import ROOT
from pcamlib.training import state

runs, slices = Path(os.environ.get("PCAM_RUNS") or ROOT / "runs"), ROOT / "journal" / "slices.yaml"
folder = data_folder()
patches = open_split(folder, "valid")
small = config.parse(config.recipe("cnn"), ["train.epochs=null", "train.steps=200"])
run = explorer.newest(runs, patches.fingerprint) or study.run("explorer", small, folder, runs)
model, named = state.load_classifier(run.best)[0], saved.read(slices)


def save(name, spec, row):
    """Keep the slice for notebook 06; what to say about it."""
    saved.add(slices, name, spec.bounds, spec.threshold)
    return f"'{name}' is in {slices.relative_to(ROOT)}; the next run of notebook 06 measures it"


display(
    explorer.Explorer(
        run.predictions(),
        features.of(patches),
        patches,
        model,
        embedding.embed(model, patches),
        save,
        {name: one.slice for name, one in named.items()},
    )
)
