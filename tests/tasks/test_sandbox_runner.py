"""What a program can do in the sandbox: nothing to anybody else. Each attack ends within its limit,
and leaves nothing running."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from marks import slow

from sodfast.tasks.sandbox import PROGRAM, Limits, Outcome, Sandbox
from sodfast.tasks.sandbox_runner import descendants, resident_bytes

LIMITS = Limits("namespaces", 128 << 20, 6)
SECONDS = 2.0

pytestmark = pytest.mark.usefixtures("namespaces")


def strangers() -> set[str]:
    """Processes of users that only the sandbox makes up, and those that run its program."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                command = Path(f"/proc/{name}/cmdline").read_bytes()
                owner = os.stat(f"/proc/{name}").st_uid
            except OSError:
                continue
            if str(PROGRAM).encode() in command or owner > 1_000_000_000:
                found.add(name)
    return found


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = strangers()
    yield
    # Tests that run beside these have sandboxes, too, but none that lasts.
    left, end = strangers() - before, time.monotonic() + 30
    while left and time.monotonic() < end:
        time.sleep(0.05)
        left &= strangers()
    assert not left


def run(program: str, stdin: str = "", limits: Limits = LIMITS) -> Outcome:
    start = time.monotonic()
    with Sandbox(limits, SECONDS) as sandbox:
        outcome = sandbox.run(program, stdin)
    assert time.monotonic() - start < SECONDS + 8
    return outcome


def test_a_program_sees_little() -> None:
    text = """
import os
print(sorted(os.listdir("/")), os.getcwd(), os.listdir("/work"))
print(sorted(os.environ), os.getuid(), os.getpid() < 10)
print(sorted(name for name in os.listdir("/proc") if name.isdigit()))
"""
    outcome = run(text)
    first, second, third = outcome.stdout.splitlines()
    for name in ("'home'", "'tmp'", "'etc'", "'bin'", "'sys'", "'run'"):
        assert name not in first
    assert first.endswith("] /work []")
    assert second == "['LC_CTYPE'] 65534 True"
    assert third == "['1', '2']"


@pytest.mark.parametrize(
    ("program", "ended", "says"),
    [
        ("x = bytearray(10**10)", "exit", "MemoryError"),
        ("import os\nwhile True: os.fork()", "exit", "BlockingIOError"),
        *slow(
            ("while True: pass", "time", ""),
            ("import time; time.sleep(1000)", "time", ""),
            ("while True: print('x' * 1000)", "output", ""),
            ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", "output", ""),
            (
                "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
                "processes|time",
                "",
            ),
            (
                "import os, signal\nos.kill(1, signal.SIGINT)\nos.kill(1, 9)\nos.kill(-1, 9)",
                "exit",
                "",
            ),
            ("import os\nos.kill(os.getpid(), 9)", "exit", ""),
        ),
    ],
    ids=["memory", "forks", "loop", "sleep", "flood", "errors", "more forks", "kill", "itself"],
)
def test_an_attack_is_ended(program: str, ended: str, says: str) -> None:
    outcome = run(program)
    assert outcome.ended in ended.split("|")
    assert outcome.ended != "exit" or says in outcome.stderr
    assert len(outcome.stdout) <= 64 << 10 and len(outcome.stderr) <= 64 << 10
    assert run("print('next')").stdout == "next\n"


def test_memory_is_counted_over_all_processes() -> None:
    text = """
import os, time
os.fork(), os.fork()
x = bytearray(60 << 20)
x[::4096] = b"1" * len(x[::4096])
time.sleep(10)
"""
    assert run(text).ended == "memory"


def test_threads_count_as_processes() -> None:
    text = """
import threading, time
for _ in range(20): threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
"""
    assert "can't start new thread" in run(text).stderr


TRY = """
import os, socket
def attempt(name, what):
    try: print(name, "DONE", what())
    except OSError as error: print(name, error.strerror)
"""


def test_nothing_outside_is_written_or_read(tmp_path: Path) -> None:
    """`tmp_path` stands for the run directory."""
    (tmp_path / "secret").write_text("secret")
    tmp_path.chmod(0o777)
    (tmp_path / "secret").chmod(0o666)
    paths = [str(tmp_path / "secret"), str(tmp_path), os.path.expanduser("~/.bashrc")]
    paths += ["/etc/passwd", "/x", "/usr/lib/x", "/dev/x", "/proc/1/environ", "/proc/1/root/etc"]
    paths += [str(Path(__file__)), os.path.dirname(os.path.realpath(sys.executable)) + "/x"]
    text = TRY
    for path in paths:
        text += f"attempt('read', lambda: open({path!r}).read())\n"
        text += f"attempt('write', lambda: open({path!r}, 'w').write('x'))\n"
        text += f"attempt('list', lambda: os.listdir({path!r}))\n"
    text += f"attempt('remove', lambda: os.remove({str(tmp_path / 'secret')!r}))\n"
    outcome = run(text)
    assert outcome.ended == "exit" and outcome.code == 0
    assert len(outcome.stdout.splitlines()) == 3 * len(paths) + 1
    assert "DONE" not in outcome.stdout
    assert (tmp_path / "secret").read_text() == "secret"


def test_its_own_folder_is_writable_and_small() -> None:
    text = """
open("/work/a", "w").write("1")
print(open("a").read())
try:
    for i in range(20): open(f"/work/{i}", "wb").write(b"x" * (8 << 20))
except OSError as error: print(i < 10, error.strerror)
try: open("/work/a", "wb").write(b"x" * (32 << 20))
except OSError as error: print(error.strerror)
"""
    lines = run(text).stdout.splitlines()
    assert lines[:2] == ["1", "True No space left on device"] and len(lines) == 3


def test_there_is_no_network() -> None:
    text = (
        TRY
        + """
attempt("self", lambda: socket.create_connection(("127.0.0.1", 9), 1))
attempt("other", lambda: socket.create_connection(("1.1.1.1", 53), 1))
"""
    )
    assert run(text).stdout.split("\n")[:2] == [
        "self Network is unreachable",
        "other Network is unreachable",
    ]


def test_no_way_back_to_more_rights() -> None:
    text = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
calls = [lambda flag=flag: libc.unshare(flag) for flag in (0x10000000, 0x20000, 0x40000000)]
calls += [lambda: libc.mount(b"x", b"/work", b"tmpfs", 0, None), lambda: libc.chroot(b"/work")]
calls += [lambda: libc.ptrace(16, 1, 0, 0), lambda: libc.setuid(0), lambda: libc.umount(b"/work")]
print([call() for call in calls])
"""
    assert run(text).stdout == f"{[-1] * 8}\n"


def test_a_child_in_a_session_of_its_own_ends_too(tmp_path: Path) -> None:
    text = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for descriptor in range(3): os.close(descriptor)
        time.sleep(1000)
    os._exit(0)
print("done")
"""
    assert run(text).stdout == "done\n"


def test_programs_of_one_answer_do_not_see_each_other() -> None:
    with Sandbox(LIMITS, 20) as sandbox:
        assert sandbox.run("import sys; sys.modules['json'].x = x = 1").code == 0
        assert "NameError" in sandbox.run("print(x)").stderr
        assert "AttributeError" in sandbox.run("import json; json.x").stderr


def test_threads_are_waited_for_as_in_python() -> None:
    text = "import threading\nthreading.Timer(0.1, lambda: print('late')).start()\nprint('é')"
    assert run(text) == Outcome("exit", 0, "é\nlate\n")


@pytest.mark.slow
def test_where_no_namespace_is_allowed_it_says_so() -> None:
    """The kernel's limit, set to none in a user namespace of the test's own."""
    limits = '{"isolation": "namespaces", "memory": 134217728, "processes": 6}'
    script = (
        f"echo 0 > /proc/sys/user/max_user_namespaces; {sys.executable} -I {PROGRAM} '{limits}'"
    )
    found = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", script], input="", capture_output=True, text=True
    )
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1].startswith("[Errno 28] unshare: No space left")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_it_holds_for_others_than_root(tmp_path: Path) -> None:
    """As a plain user, and as the root of a user namespace that has one id, such as a container."""
    program = tmp_path / "runner.py"
    program.write_bytes(PROGRAM.read_bytes())
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    python = next(
        (p for p in ("/usr/bin/python3", "/usr/local/bin/python3") if os.path.exists(p)), None
    )
    if python is None:
        pytest.skip("no Python here that another user may run")
    limits = '{"isolation": "namespaces", "memory": 134217728, "processes": 6}'
    request = '{"program": "import os\\nwhile True: os.fork()", "seconds": 2}\n'
    plain = ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups"]
    for before in (plain, [*plain, "unshare", "-Ur"]):
        command = [*before, python, "-I", "-S", "-B", str(program), limits]
        found = subprocess.run(command, input=request, capture_output=True, text=True, env={})
        assert "BlockingIOError" in found.stdout, (before, found.stderr)


def test_the_processes_below_this_one() -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert sleeper.pid in descendants() and os.getpid() not in descendants()
        assert resident_bytes(sleeper.pid) > 0
    finally:
        sleeper.communicate(b"\n")
    assert sleeper.pid not in descendants() and resident_bytes(sleeper.pid) == 0


@pytest.mark.slow
def test_a_sandbox_ends_with_the_process_that_has_started_it() -> None:
    script = """
import os, sys
from sodfast.tasks.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits("namespaces", 128 << 20, 6), 60)
sandbox._worker._process.stdin.write(b'{"program": "while True: pass", "seconds": 60}\\n')
print(sandbox._worker._process.pid, flush=True)
os.kill(sandbox._worker._process.pid, 9)
"""
    found: Any = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip()
    for _ in range(100):
        if not strangers():
            break
        time.sleep(0.05)
