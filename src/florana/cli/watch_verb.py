"""The verb `watch`: how a run stands, in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from florana.cli.say import say


def watch(
    run: Annotated[Path, typer.Argument(help="The folder of a run, of 'serve', or of a study; it goes on or is done.")],
    host: Annotated[str, typer.Option(help="The address to listen on; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 0,
    every: Annotated[int, typer.Option(min=1, help="Seconds after which the page looks again.")] = 5,
) -> None:
    """Show a run or a study in a browser while it goes on: its report, and how it stands. Reads, and changes nothing.

    Example: florana watch runs/sst2
    """
    from florana.report.watch import watching

    with watching(run, host, port, every) as (server, address):
        say(f"watching {run}: {address} (Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("no longer watching; the run goes on")
