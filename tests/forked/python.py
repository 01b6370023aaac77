"""Stands in for the Python interpreter: its server runs the arguments in a fork (servers.py).

A test gets it as an executable file with the server's socket beside it. It has the same streams,
working directory, environment and umask as the fork, passes signals on to it, and ends as it does.
If this process is killed, so is the fork. Imports only what Python itself has nearly imported.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def main() -> None:
    """Have the arguments run, and end with the exit code or signal with which they ended."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "socket"))
    mask = os.umask(0)
    os.umask(mask)
    command = {
        "interpreter": os.path.abspath(__file__),
        "arguments": sys.argv[1:],
        "directory": os.getcwd(),
        "umask": mask,
        "environment": dict(os.environ),
    }
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: server.send(str(number).encode()))
    socket.send_fds(server, [json.dumps(command).encode()], [0, 1, 2])
    answer = server.recv(100)
    if not answer:
        sys.exit("the process that imports packages for tests has ended: see the output above")
    code = int(answer)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
