"""What a process of its own is wanted for; imports nothing that takes long."""

import os
import signal


def dies():
    os.kill(os.getpid(), signal.SIGSEGV)


def raises(text):
    os.write(1, text.encode())
    raise ArithmeticError("two\n  lines")
