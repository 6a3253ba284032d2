"""Predict patches of PNG, JPEG, TIFF or H5 files, or folders of them, with a checkpoint alone.

    python inference.py --checkpoint best.safetensors INPUT... [--threshold chosen|0.5|X] [--out predictions.csv]
Exit code 0: all answered, 1: some files were not (they are named), 2: nothing was.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pcamlib.cli import main
from pcamlib.errors import ConfigError


def infer(
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="PNG, JPEG, TIFF, H5 or a folder of them.")],
    checkpoint: Annotated[Path, typer.Option(help="best.safetensors of a run.")],
    threshold: Annotated[str, typer.Option(help="Call tumour from here on: 'chosen' or 0 to 1.")] = "chosen",
    out: Annotated[Path | None, typer.Option(help="CSV to write; else it is printed.")] = None,
    centre_crop: Annotated[bool, typer.Option("--centre-crop", help="Look at the centre of larger pictures.")] = False,
    tile: Annotated[bool, typer.Option("--tile", help="Look at all of larger pictures, .97 um a pixel.")] = False,
    step: Annotated[int, typer.Option(min=8, max=96, help="Pixels from tile to tile; 32 judges every pixel.")] = 96,
    heat: Annotated[Path | None, typer.Option(help="PNG of a picture's probabilities; implies --tile.")] = None,
    precision: Annotated[str, typer.Option(help="auto (bf16 where the CPU multiplies it), bf16 or fp32.")] = "auto",
) -> None:
    """Predict patches with a checkpoint alone."""
    from pcamlib.serving.predict import Predictor, run

    if step != 96 and not (tile or heat):
        raise ConfigError(f"--step {step}: nothing is tiled; give --tile or --heat too")
    if centre_crop and (tile or heat):
        raise ConfigError("--centre-crop: all of a picture is tiled; leave it out, or --tile and --heat")
    predictor = Predictor(checkpoint, precision)
    print(predictor.about(), file=sys.stderr)
    how = "tile" if tile or heat else "centre" if centre_crop else "refuse"
    result = run(predictor, inputs, out=out, threshold=threshold, how=how, step=step, heat=heat)
    print(result.text(), file=sys.stdout if out else sys.stderr)
    raise typer.Exit(1 if result.refused else 0)


if __name__ == "__main__":
    (app := typer.Typer(add_completion=False, rich_markup_mode=None)).command()(infer)
    main(app)
