"""What the service counts, for Prometheus: `GET /metrics`. serving/alerts.yml says what to be woken for.

Nothing that a client sends becomes a label: paths, statuses, features and calls are short fixed lists.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10)
_PATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
disable_created_metrics()  # a second line for each counter


class Telemetry:
    """The metrics of one service, in a registry of its own; `process_resident_memory_bytes` is among them.

    Args:
        about: labels of the constant `pcam_info`.
    """

    def __init__(self, about: Mapping[str, str]) -> None:
        self.registry = to = CollectorRegistry()
        ProcessCollector(registry=to)
        Gauge("pcam_info", "The checkpoint that answers.", list(about), registry=to).labels(**about).set(1)
        self.requests = Counter("pcam_requests_total", "Requests.", ["path", "status"], registry=to)
        text = "From the headers to the end of the answer."
        self.latency = Histogram("pcam_latency_seconds", text, ["path"], buckets=_SECONDS, registry=to)
        self.batches = Histogram("pcam_batch_patches", "Patches a batch.", buckets=_PATCHES, registry=to)
        self.waiting = Gauge("pcam_queue_patches", "Patches that wait.", registry=to)
        self.full = Counter("pcam_queue_full_total", "Requests refused since too much waited.", registry=to)
        self.predictions = Counter("pcam_predictions_total", "Patches, by call.", ["called"], registry=to)
        self.errors = Counter("pcam_image_errors_total", "Images refused, by status.", ["status"], registry=to)
        self.outlying = Counter("pcam_outlying_total", "Patches unlike the reference's.", registry=to)
        text = "Kolmogorov-Smirnov distance of the newest patches from the reference."
        self.statistic = Gauge("pcam_drift_statistic", text, ["feature"], registry=to)
        self.drifted = Gauge("pcam_drifted", "1: the newest patches have drifted.", registry=to)
        self.collecting = Gauge("pcam_collecting", "1: patches are written to disk.", registry=to)
        self.failures = Counter("pcam_collect_failures_total", "Times that collecting ended.", registry=to)
        for called in ("tumour", "normal"):  # a rate needs a zero to begin with
            self.predictions.labels(called)
