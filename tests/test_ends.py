"""How a command begins and ends."""

import signal

from redheart.ends import ending


def test_an_interrupt_reaches_a_command_that_a_shell_started_in_the_background():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ending():
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
