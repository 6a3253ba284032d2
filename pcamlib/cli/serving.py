"""`pcam serve`, `export`, `bundle` and `drift`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pcamlib.cli.options import DataOption
from pcamlib.errors import ConfigError

commands = typer.Typer()
drift_app = typer.Typer(help="Do patches look like those that a checkpoint was judged on?")
commands.add_typer(drift_app, name="drift")


@commands.command("serve")
def serve(
    checkpoint: Annotated[Path, typer.Option(help="best.safetensors of a run; it suffices alone.")],
    reference: Annotated[Path | None, typer.Option(help="Of `pcam drift reference`: flags odd patches, drift.")] = None,
    host: Annotated[str, typer.Option(help="Another than this machine's needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="Holds the token to ask with; else $PCAM_TOKEN.")] = None,
    collect: Annotated[Path | None, typer.Option(help="Folder for measurements and answers, newest 100,000.")] = None,
    collect_pixels: Annotated[bool, typer.Option("--collect-pixels", help="Keep the patches too: 2.8 GB.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of the network; HTTP has one of its own.")] = 1,
    room: Annotated[int, typer.Option(min=1, help="Patches that may wait before requests get a 503.")] = 512,
    seconds: Annotated[float, typer.Option(min=0.1, help="For a request to arrive.")] = 20.0,
) -> None:
    """Answer over HTTP: POST /predict, POST /drift, /health, /metrics, /docs, and a page at /. TERM ends it, code 0."""
    from pcamlib.serving import server
    from pcamlib.serving.upload import Limits

    if collect_pixels and not collect:
        raise ConfigError("--collect-pixels: nothing is collected; give --collect FOLDER too")
    key = server.read_token(token_file, os.environ.get("PCAM_TOKEN"))
    server.check_host(host, key)
    limits = Limits(room=room, seconds=seconds)
    service = server.load(checkpoint, limits, reference, threads, collect=collect, pixels=collect_pixels)
    server.run(service, host, port, key)


@commands.command("export")
def export(
    checkpoint: Path,
    out: Annotated[Path, typer.Option(help="Folder; model.onnx, model-fp16.onnx, model-int8.onnx, parity.json.")],
    data: DataOption = None,
) -> None:
    """A checkpoint as ONNX in three precisions, each held against it on the valid split; refused where it differs."""
    from pcamlib.data.folder import data_folder
    from pcamlib.serving import export as exporting

    exporting.export(checkpoint, out, data_folder(data))


@commands.command("bundle")
def bundle(
    out: Path,
    checkpoint: Annotated[Path, typer.Option(help="best.safetensors of a finished run.")],
    data: Annotated[Path | None, typer.Option(help="Its valid split gives the sample; default: synthetic.")] = None,
    platform: Annotated[str, typer.Option(help="Of the machine that the stick is for.")] = "manylinux_2_28_x86_64",
    python: Annotated[str, typer.Option(help="Of that machine.")] = "3.11",
    wheels: Annotated[bool, typer.Option("--wheels/--no-wheels", help="Fetch the packages too.")] = True,
) -> None:
    """Everything that inference needs on a machine without a network: code, weights, wheels, a sample, checksums."""
    from pcamlib.serving import bundle as bundling

    bundling.write(out, checkpoint, data=data, platform=platform, python=python, wheels=wheels)


@drift_app.callback(invoke_without_command=True)
def drift(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Option(help="The one that the reference was made with.")] = Path(
        "best.safetensors"
    ),
    reference: Annotated[Path, typer.Option(help="Of `pcam drift reference`.")] = Path("reference.npz"),
    data: DataOption = None,
    split: Annotated[str, typer.Option(help="Whose patches are compared.")] = "test",
    size: Annotated[int, typer.Option(help="Patches, evenly spaced.")] = 500,
    json: Annotated[Path | None, typer.Option(help="Write the whole report there.")] = None,
) -> None:
    """Do the patches of a split look like the reference? Exit code 0: yes, 1: drift."""
    if context.invoked_subcommand:
        return
    from pcamlib.data.folder import data_folder
    from pcamlib.data.patches import open_split, sample
    from pcamlib.files import write_json
    from pcamlib.serving.drift import Reference, observed
    from pcamlib.serving.predict import Predictor

    predictor = Predictor(checkpoint)
    known, patches = Reference.load(reference, predictor.model), open_split(data_folder(data), split)
    report = known.compare(observed(predictor, patches, sample(patches, size)))
    print(report.text())
    if json:
        write_json(json, report.json())
    raise typer.Exit(1 if report.drifted else 0)


@drift_app.command("reference")
def drift_reference(
    checkpoint: Annotated[Path, typer.Option(help="best.safetensors of a run.")],
    data: DataOption = None,
    split: Annotated[str, typer.Option(help="One that the model was not trained on.")] = "valid",
    out: Annotated[Path, typer.Option(help="File, npz.")] = Path("reference.npz"),
) -> None:
    """Measure patches that a checkpoint is at home with, as a reference for drift and odd patches."""
    from pcamlib.data.folder import data_folder
    from pcamlib.data.patches import open_split
    from pcamlib.serving.drift import Reference
    from pcamlib.serving.predict import Predictor

    made = Reference.build(Predictor(checkpoint), open_split(data_folder(data), split))
    made.save(out)
    print(f"{out}: {len(made.values):,} {'synthetic ' if made.synthetic else ''}patches of {split}")
