"""Stands before Flower's client program on a SuperNode's path: asks the process that has it loaded to run it.

Run by path, with the standard library alone: `hand_over.py SOCKET PROGRAM ARGUMENTS...`, the program as a JSON list of
words. Where nobody answers at the socket the program itself is run.
"""

from __future__ import annotations

import json
import os
import socket
import sys


def main() -> None:
    """Hand the arguments and the environment over, or become the program."""
    path, program, *arguments = sys.argv[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
            channel.connect(path)
            channel.sendall(json.dumps({"arguments": arguments, "environment": dict(os.environ)}).encode())
            channel.shutdown(socket.SHUT_WR)
            taken = channel.recv(1)
    except OSError:
        taken = b""
    if not taken:
        words = json.loads(program)
        os.execv(words[0], [*words, *arguments])


if __name__ == "__main__":
    main()
