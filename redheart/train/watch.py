"""`redheart watch RUN`: the page of a run while it trains, from what TensorBoard holds of it so far, served on this machine alone.

It is made anew for whoever asks, and the browser asks again by itself. Over ssh: `ssh -L PORT:127.0.0.1:PORT HOST`, and the same address.
"""

from __future__ import annotations

from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from redheart.config import read_config
from redheart.console import console
from redheart.evaluation.curves import CONSTANT, DEV, LOSS, OVERVIEW, RATE, learning_curves, scalars
from redheart.evaluation.page import Section, to_html
from redheart.files import read_pointer
from redheart.schema import RedHeartError
from redheart.train.checkpoint import STEP
from redheart.train.claim import is_run

REFRESH_S = 10
SHOWN = (
    LOSS,
    DEV,
    CONSTANT,
    f"{OVERVIEW}/learning_rate",
    RATE,
    f"{OVERVIEW}/host_rss_gib",
    f"{OVERVIEW}/gpu_reserved_gib",
)


def page_so_far(run: Path) -> str:
    """The last value of what the overview shows, and the learning curves, with the step of the best checkpoint so far."""
    preset = read_config(run / "config.yaml", "choose another run").preset
    found = scalars(run)
    rows = [
        (name.removeprefix(f"{OVERVIEW}/"), f"{points[step]:.4g}", str(step))
        for name in SHOWN
        if (points := found.get(name)) and (step := max(points)) >= 0
    ]
    best = read_pointer(run / "checkpoints" / "best")
    named = STEP.fullmatch(best.name) if best and best.is_dir() else None
    first = [] if rows else ["Nothing has been logged yet."]
    now = Section("Now", first, ("", "last value", "at step"), rows)
    curves = Section("Learning", picture=learning_curves(found, int(named[1]) if named else None))
    return to_html(f"Red Heart: {preset} in {run.name}", [now, curves] if rows else [now], REFRESH_S)


def watch(run: Path, port: int = 0) -> None:
    """Serves it until Ctrl-C. `port` 0: any that is free. Raises RedHeartError where there is no run, or the port is taken."""
    with server(run, port) as serving:
        console.print(f"http://127.0.0.1:{serving.server_port}/ shows {run} (Ctrl-C ends it)", markup=False)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            console.print("")


def server(run: Path, port: int) -> ThreadingHTTPServer:
    if not is_run(run):
        raise RedHeartError(f"{run} holds no run: name the directory that `redheart train --out` was given")

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # the browser may go away at any time, also while the page is made
                super().handle()

        def do_GET(self) -> None:
            name = self.headers.get("Host", "").rpartition(":")[0]
            # a page elsewhere that has its own name resolved to this machine is not answered
            if self.path != "/" or name not in ("127.0.0.1", "localhost"):
                self.send_error(404)
                return
            status = 200
            try:
                body = page_so_far(run).encode()
            except RedHeartError as error:  # the run is being replaced, and will be there when the browser asks again
                status = 503
                now = Section("Now", [f"Nothing can be shown: {error}."])
                body = to_html(f"Red Heart: {run.name}", [now], REFRESH_S).encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise RedHeartError(f"--port {port} cannot be listened on ({error.strerror}): leave it out") from None
