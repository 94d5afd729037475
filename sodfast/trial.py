"""`python -m sodfast.trial LEASH ARGUMENT...`: the command `sodfast ARGUMENT...` on a leash.

LEASH is the reading end of a pipe whose writing end only the sweep holds. When the sweep lets go,
to stop the trial or because it died, however it died, the trial gets SIGTERM: it saves its last
finished step and exits with 130. (Linux's PR_SET_PDEATHSIG fires when the parent's *thread* ends.)
"""

import os
import signal
import sys
import threading


def main() -> None:
    leash = int(sys.argv[1])
    sys.argv = ["sodfast", *sys.argv[2:]]
    # Before the slow imports: a driver that dies meanwhile must be noticed, too.
    threading.Thread(target=_watch, args=(leash,), daemon=True).start()

    from sodfast import cli

    cli.main()


def _watch(leash: int) -> None:
    os.read(leash, 1)  # nothing is ever written: this returns when the other end is closed
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


if __name__ == "__main__":
    main()
