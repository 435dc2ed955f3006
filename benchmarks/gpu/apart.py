"""A call in a process of its own: whatever it does there, hang or crash, the caller goes on."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from typing import NamedTuple

EXIT_S = 10.0  # for the end of a process that is done


class Ended(NamedTuple):
    """How a call in a process of its own ended."""

    value: object  # what it returned, None if it did not
    error: str | None  # why it did not
    output: str  # what it printed, to the traceback


def apart(call, limit):
    """call() in a process of its own, killed after `limit` seconds: an Ended.

    The process comes from a server that has imported the call's module and touched no GPU.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(call, "func", call).__module__])
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(call, theirs, output.name), daemon=True)
        process.start()
        theirs.close()
        try:
            value, error = ours.recv() if ours.poll(limit) else (None, f"killed after {limit:g} s")
        except EOFError:
            process.join(EXIT_S)
            value, error = None, f"ended with {process.exitcode}"
        else:
            process.join(EXIT_S if error is None else 0)
        process.kill()
        process.join()
        return Ended(value, error, output.read())


def _send(call, pipe, output):
    """In the process: (value, None) or (None, error); what is printed goes to the file `output`."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        value = call()
        sys.stdout.flush()
        pipe.send((value, None))
    except Exception as error:
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"))
        raise SystemExit(1) from None
