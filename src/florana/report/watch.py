"""`florana watch`: the report of a run, or how a study stands, on loopback, made anew as rounds are committed.

It reads, and writes nothing.

The standard library's server is enough for one page on one's own machine: GET and HEAD of `/`, no script, no session,
no file by its name. A page of another site that a browser was led to cannot read it: the Host header must be an address
or this machine's own name (DNS rebinding needs a name of its own), and nothing may be framed or fetched from elsewhere.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from florana.errors import FederationError, FloranaError, InputError
from florana.report.live import live_of
from florana.report.live_study import live_study_of
from florana.report.page import render, template
from florana.report.views import views
from florana.runs.run_folder import PROGRESS, STUDY, at_work

SECONDS = 10.0
"""For a request to come in whole."""


def page_of(folder: Path, every: int) -> str:
    """The page as it is now: the report with how the run stands above it.

    Args:
        folder: the run folder, or a study's.
        every: seconds after which the page looks again.

    Raises:
        InputError: it is no run folder, or one that cannot be read.
    """
    if (folder / STUDY).exists():
        return template("live_study.html.j2").render(live=live_study_of(folder, every))
    live = live_of(folder, every)
    if not live.round:
        return template("live.html.j2").render(live=live, alone=True)
    panel = template("live.html.j2").render(live=live, alone=False)
    runs = views([folder])
    return render(runs, runs[0].recipe.get("title") or "florana", above=panel, every=every)


@contextmanager
def watching(folder: Path, host: str, port: int, every: int) -> Iterator[tuple[ThreadingHTTPServer, str]]:
    """The server, bound and not yet serving, and its address.

    Args:
        folder: the run folder.
        host: the address to listen on.
        port: 0 takes one that is free.
        every: seconds after which the page looks again.

    Raises:
        InputError: it is no run folder.
        FederationError: the port cannot be had.
    """
    known = ("rounds.jsonl", PROGRESS, STUDY)
    if not any((folder / name).exists() for name in known) and not _begun(folder):
        raise InputError(
            f"{folder} is no run folder", fix="give the folder of 'florana run', 'florana serve' or 'florana compare'"
        )
    kept: dict[str, object] = {}

    class Page(BaseHTTPRequestHandler):
        """One page."""

        timeout = SECONDS
        server_version, sys_version = "florana", ""

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            if not trusted(self.headers.get("Host", ""), host):
                self._send(HTTPStatus.FORBIDDEN, "this page is for the address that florana watch printed", body)
            elif self.path != "/":
                self._send(HTTPStatus.NOT_FOUND, "there is one page, at /", body)
            else:
                try:
                    self._send(HTTPStatus.OK, self._page(), body)
                except (FloranaError, OSError) as error:
                    self._send(HTTPStatus.SERVICE_UNAVAILABLE, f"the run cannot be read: {error}", body)

        def _page(self) -> str:
            """Drawn anew where the folder has changed."""
            names = ("rounds.jsonl", PROGRESS, STUDY, "failures.json", "recipe.toml")
            looked_at = [folder / name for name in names] + sorted((folder / "runs").glob("*/*/*/rounds.jsonl"))
            seen = [at_work(folder), *(path.stat().st_mtime_ns for path in looked_at if path.exists())]
            if kept.get("seen") != seen:
                kept.update(page=page_of(folder, every), seen=seen)
            return str(kept["page"])

        def _send(self, status: HTTPStatus, text: str, body: bool) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"text/{'html' if status == HTTPStatus.OK else 'plain'}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Content-Security-Policy", "frame-ancestors 'none'")
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Nobody needs a line for each look."""

        def log_error(self, *_: object) -> None:
            """Nor for a request that is refused: whoever sent it is told."""

    try:
        server = ThreadingHTTPServer((host, port), Page)
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise FederationError(f"cannot listen on {host}:{port}", why=why, fix="choose another --port") from None
    server.daemon_threads = True
    bound = server.server_address[1]
    try:
        yield server, f"http://{host}:{bound}/"
    finally:
        server.server_close()


def trusted(header: str, host: str) -> bool:
    """Whether a Host header is an address, localhost, or the name that was listened on; of any port, which differs
    behind a tunnel.

    Args:
        header: as it came.
        host: what the server listens on.

    Examples:
        >>> [trusted(header, "127.0.0.1") for header in ("127.0.0.1:80", "[::1]:9", "localhost", "evil.example:80", "")]
        [True, True, True, False, False]
    """
    name = re.sub(r":\d*$", "", header).strip("[]")
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.lower() in {"localhost", host.lower()}
    return True


def _begun(folder: Path) -> bool:
    """A run that has written its recipe and no round yet."""
    return (folder / "recipe.toml").exists() and (folder / "setup.json").exists()
