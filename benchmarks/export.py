"""Export: one patch at a time through ONNX Runtime, against eager PyTorch in the same rounds; parity beside it.

    python benchmarks/export.py [--json FILE] [--rounds 200] [--checkpoint FILE --data DIR]

Each round calls every way once with one patch, so that a busy neighbour meets all of them; the median is reported, and
the ratio is the median of the paired ones. Without --checkpoint the small CNN (recipe `cnn`) is trained for 200 steps
on synthetic patches: times and parity need no good network.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from _rows import arguments, finish, row

from pcamlib.config import parse, recipe
from pcamlib.data.patches import open_split, sample, take
from pcamlib.data.synthetic import generate
from pcamlib.models import onnx
from pcamlib.serving import compress, export
from pcamlib.serving.predict import Predictor
from pcamlib.training import loop


def trained(folder: Path) -> tuple[Path, Path]:
    """Checkpoint and data of a short run on synthetic patches."""
    generate(folder / "data", sizes={"train": 4000, "valid": 1000}, report=lambda line: None)
    settings = parse(recipe("cnn"), ["train.epochs=null", "train.steps=200"])
    return loop.train(settings, folder / "data", folder / "run", report=lambda line: None).best, folder / "data"


def main() -> int:
    parser = arguments(__doc__)
    parser.set_defaults(rounds=200)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--data", type=Path, help="valid to compare on, train to calibrate int8")
    options = parser.parse_args()
    if bool(options.checkpoint) != bool(options.data):
        parser.error("--checkpoint and --data go together: patches of the kind that it learned from")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, data = (options.checkpoint, options.data) if options.data else trained(Path(folder))
        predictor, valid, train = Predictor(checkpoint), open_split(data, "valid"), open_split(data, "train")
        calibration = take(train.images, sample(train, export.CALIBRATION))
        made, parity = export.build(predictor, valid, sample(valid, 3000), calibration)
        one = np.ascontiguousarray(export.planes(take(valid.images, slice(0, 1))))
        tensor = torch.from_numpy(one)
        for threads in (1, 2):
            sessions = {name: onnx.session(model, threads) for name, model in made.items()}
            calls = {"eager": lambda: predictor.model(tensor)}
            calls |= {name: lambda s=session: onnx.logits(s, one) for name, session in sessions.items()}
            with torch.inference_mode():
                seconds = compress.latency(calls, options.rounds, threads)
            against = f"eager: p50 {1000 * np.median(seconds['eager']):.2f} ms"
            for told in parity:
                name = told["precision"]
                gain = float(np.median(seconds["eager"] / seconds[name]))
                bar = "RATIO>=2" if threads == 1 and name != "fp16" else ""
                low, high = (1000 * np.percentile(seconds[name], q) for q in (50, 90))
                what, note = f"one patch, ONNX {name}, {threads} threads", f"{against}; p90 here {high:.2f} ms"
                rows.append(row(what, low, "ms", n=options.rounds, against=note, ratio=gain, bar=bar))
        for told in parity:
            note = (
                f"{told['n']:,} {told['patches']} patches; AUC {told['AUC']:.4f}, of the checkpoint "
                f"{told['AUC of the checkpoint']:.4f}; {told['calls changed']} calls changed; {told['MB']:.2f} MB"
            )
            bar = f"VALUE<={export.TOLERANCE[told['precision']][0]}"
            rows.append(row(f"parity, {told['precision']}: off by", told["off by"], "prob", n=1, against=note, bar=bar))
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
