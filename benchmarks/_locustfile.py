"""Users of the service: each sends one patch, thinks, sends the next; told 503, it waits as long as it was told.

Run by benchmarks/service.py, which gives the folder of images as PCAM_IMAGES and the mean time to think, in seconds, as
PCAM_THINK. Any answer other than 200 and a 503 with Retry-After is a failure.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import gevent
from locust import FastHttpUser, between, task

THINK = float(os.environ["PCAM_THINK"])
BOUNDARY = "pcam-boundary"


def body(path: Path) -> bytes:
    """A file as multipart/form-data: made once, so that the generator spends its core on sending."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="{path.name}"\r\n\r\n'
    return head.encode() + path.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()


BODIES = itertools.cycle([body(path) for path in sorted(Path(os.environ["PCAM_IMAGES"]).iterdir())])
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


class Pathologist(FastHttpUser):
    """Thinks for half to one and a half times the mean; an answer may take 10 s."""

    wait_time = between(THINK / 2, 1.5 * THINK)
    network_timeout = connection_timeout = 10.0

    @task
    def judge(self) -> None:
        """One patch."""
        with self.client.post("/predict", data=next(BODIES), headers=HEADERS, catch_response=True) as answer:
            wait = answer.headers.get("Retry-After") if answer.status_code == 503 else None
            if wait:
                answer.request_meta["name"] = "503 with Retry-After"
                answer.success()
            elif answer.status_code != 200 or b'"probability": 0' not in answer.content:
                answer.failure(f"{answer.status_code}: {answer.text}")
        if wait:
            gevent.sleep(float(wait))
