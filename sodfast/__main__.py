"""`python -m sodfast ARGUMENT...`: the command `sodfast`, on a leash where a sweep started it.

The environment variable SODFAST_LEASH names the reading end of a pipe whose writing end only the
sweep holds. When the sweep lets go, to stop the trial or because it died, however it died, the
trial gets SIGTERM: it saves its last finished step and exits with 130. (Linux's PR_SET_PDEATHSIG
fires when the parent's *thread* ends.)
"""

import os
import signal
import threading


def main() -> None:
    leash = os.environ.pop("SODFAST_LEASH", None)
    if leash is not None:
        # Before the slow imports, so that a sweep that dies meanwhile is noticed, too.
        threading.Thread(target=_watch, args=(int(leash),), daemon=True).start()

    from sodfast import cli

    cli.main()


def _watch(leash: int) -> None:
    os.read(leash, 1)  # nothing is ever written: this returns when the other end is closed
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


main()
