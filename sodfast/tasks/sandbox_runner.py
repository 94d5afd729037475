"""Runs a model's programs apart from everything else, as a program of its own on Linux.

Its one argument is the JSON of `Limits` in sandbox.py. Each line of standard input is a program to
run and each line that comes back says how that ended, `{"ended", "code", "stdout", "stderr",
"passed"}`; any end but "exit" is the last, and whatever runs is killed then. Three processes:

    supervisor   outside; maps the ids of the namespaces and waits
    builder      enters new user, mount, PID, network, IPC, UTS and cgroup namespaces and builds the
                 root: Python's standard library and the C libraries, read-only, and /work in memory
    runner       PID 1 in there, without capabilities; forks a process for each program, measures
                 the memory of all, and with its own end the kernel ends all others

It imports nothing but the standard library, because a model's program is a fork of it.
"""

import ctypes
import errno
import json
import linecache
import os
import resource
import select
import signal
import site
import sys
import time
import traceback
import types
from collections.abc import Callable
from contextlib import suppress
from typing import Any

OUTPUT = 64 << 10  # bytes of standard output, and of standard error, at most
FILES = 16 << 20  # bytes of a file, at most
WORK = 64 << 20  # bytes of all files in /work
POLL = 0.02  # seconds between two looks at memory and processes
NOBODY = 65534  # who a program is, as it sees itself

# <sched.h>, <sys/mount.h>, <sys/prctl.h>: what Python 3.11 does not offer.
NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
AT_FDCWD, AT_RECURSIVE, MOUNT_SETATTR = -100, 0x8000, 442
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
CAPABILITY_VERSION = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    limits = json.loads(sys.argv[1])
    if limits["isolation"] == "rlimits":
        import shutil  # these two take longer to import than all others, and are needed here alone
        import tempfile

        work = tempfile.mkdtemp()
        os.chdir(work)
        checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")
        try:
            serve(limits, descendants)
        finally:
            if os.getpid() == SUPERVISOR:  # and not in the process of a program
                end_descendants()
                os.chdir("/")
                shutil.rmtree(work, ignore_errors=True)
        return
    supervise(limits)


SUPERVISOR = os.getpid()


def checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


# ---------------------------------------------------------------- namespaces


def supervise(limits: dict[str, Any]) -> None:
    """Start the builder, map its ids, and wait until it has ended."""
    user, group = os.geteuid(), os.getegid()  # in new namespaces they have no name at first
    if user == 0:
        with suppress(PermissionError):  # in a namespace whose groups are fixed
            os.setgroups([])
    unshared, maps = os.pipe(), os.pipe()
    builder = os.fork()
    if builder == 0:
        checked(
            libc.unshare(NEWUSER | NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS | NEWCGROUP), "unshare"
        )
        os.write(unshared[1], b"1")
        if user != 0:
            map_ids("self", user, group)
        else:
            os.close(maps[1])
            if os.read(maps[0], 1) != b"1":
                os._exit(1)  # the supervisor has said why
        build(limits)
    os.close(unshared[1])
    if os.read(unshared[0], 1) == b"1" and user == 0:
        map_root(builder)
        os.write(maps[1], b"1")
    for descriptor in (0, 1):
        os.close(descriptor)  # of the runner alone, so that its end is seen
    _, status = os.waitpid(builder, 0)
    sys.exit(os.waitstatus_to_exitcode(status) != 0)


def map_root(builder: int) -> None:
    """Make the builder, which root has started, somebody who owns nothing: root's files, signals
    and its freedom from RLIMIT_NPROC are another's. In a container that has few ids nobody's must
    do, or its root's, which is somebody else's outside."""
    for outside in (1_000_000_000 + builder, NOBODY, 0):
        try:
            return map_ids(str(builder), outside, outside)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL) or outside == 0:
                raise


def map_ids(process: str, user: int, group: int) -> None:
    for name, text in (
        ("setgroups", "deny"),
        ("gid_map", f"{NOBODY} {group} 1"),
        ("uid_map", f"{NOBODY} {user} 1"),
    ):
        with open(f"/proc/{process}/{name}", "wb", buffering=0) as file:
            try:
                file.write(text.encode())
            except OSError as error:
                # A map is written once: what a first choice has left need not be written again.
                if name == "uid_map" or error.errno != errno.EPERM:
                    raise


def build(limits: dict[str, Any]) -> None:
    """In the new namespaces: build the root, then be the parent of the runner."""
    # Python may lie where only root may look, and so is found before root's rights are given up.
    sources = [(path, os.open(path, os.O_PATH)) for path in library_paths() + device_paths()]
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    die_with_parent()  # the kernel forgets it with every change of the user
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = build_root(sources)
    runner = os.fork()
    if runner == 0:
        run_apart(limits, root)
    os.close(0)
    os.close(1)
    _, status = os.waitpid(runner, 0)
    os._exit(os.waitstatus_to_exitcode(status) != 0)


def run_apart(limits: dict[str, Any], root: str) -> None:
    mount(
        "proc", f"{root}/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "subset=pid"
    )
    make_read_only(root, 0)
    # A process that is not at its namespace's root can make no user namespace of its own either.
    os.chroot(root)
    os.chdir("/work")
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    drop_capabilities()
    checked(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")  # no program may look into this one
    die_with_parent()
    require_a_bound_on_processes()
    serve(limits, everybody_else)
    sys.exit()


def build_root(sources: list[tuple[str, int]]) -> str:
    """A file system in memory with what a program may see. Returns its path."""
    paths = [path for path, _ in sources]
    places = ("/mnt", "/media", "/opt", "/srv", "/tmp", "/var/tmp")
    free = [p for p in places if os.path.isdir(p) and not any(o.startswith(p) for o in paths)]
    if not free:
        raise OSError(errno.ENOENT, f"none of {', '.join(places)} is free to mount on")
    root = free[0]
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path, descriptor in sources:
        inside, source = root + path, f"/proc/self/fd/{descriptor}"
        if os.path.isdir(source):
            os.makedirs(inside, exist_ok=True)
            mount(source, inside, None, MS_BIND | MS_REC)
            make_read_only(inside, MS_NOSUID | MS_NODEV)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            open(inside, "w").close()
            mount(source, inside, None, MS_BIND)
            make_read_only(inside, MS_NOSUID)
        os.close(descriptor)
    for name in ("/lib", "/lib64"):
        if os.path.islink(name):
            os.symlink(os.readlink(name), root + name)
    for name in ("work", "proc"):
        os.mkdir(f"{root}/{name}")
    options = f"size={WORK},mode=700"
    mount("tmpfs", f"{root}/work", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    return root


def library_paths() -> list[str]:
    """Folders that Python itself is read from: its standard library and the C libraries."""
    standard = os.path.dirname(os.path.realpath(os.__file__))
    paths = [os.path.dirname(standard)]  # with the C libraries that conda puts there
    paths += [name for name in ("/lib", "/lib64") if not os.path.islink(name)]
    paths += ["/usr/lib", "/usr/lib64", "/usr/share/zoneinfo"]
    kept: list[str] = []
    for path in sorted({path for path in paths if os.path.isdir(path)}):
        if not any(path.startswith(f"{other}/") for other in kept):
            kept.append(path)
    return kept


def device_paths() -> list[str]:
    return [f"/dev/{name}" for name in ("null", "zero", "random", "urandom")]


def mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    encoded = [text and text.encode() for text in (source, target, kind)]
    data = options and options.encode()
    checked(libc.mount(*encoded, ctypes.c_ulong(flags), data), f"mount {source} on {target}")


class _MountAttributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def make_read_only(path: str, flags: int) -> None:
    """Recursively: what is mounted below a folder would stay writable otherwise."""
    attributes = _MountAttributes(MS_RDONLY | flags, 0, 0, 0)
    recursive = AT_RECURSIVE if flags else 0
    result = libc.syscall(
        MOUNT_SETATTR,
        AT_FDCWD,
        path.encode(),
        recursive,
        ctypes.byref(attributes),
        ctypes.sizeof(attributes),
    )
    checked(result, f"mount_setattr {path}")


def drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    checked(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def die_with_parent() -> None:
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def require_a_bound_on_processes() -> None:
    """RLIMIT_NPROC binds whoever is not root; that it does is tried here."""
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
    try:
        child = os.fork()
    except BlockingIOError:
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
        return
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    raise OSError(errno.EPERM, "the number of processes cannot be limited")


# ---------------------------------------------------------------- programs


def serve(limits: dict[str, Any], others: Callable[[], list[int]]) -> None:
    """Run what standard input asks for, until it is closed or a program exceeds a limit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one signal that a program could end it with
    requests = os.fdopen(0, closefd=False)
    bound_resources(limits)
    for line in requests:
        request = json.loads(line)
        reply = run(request, limits, others) if "program" in request else {"ready": True}
        os.write(1, json.dumps(reply).encode() + b"\n")
        if reply.get("ended", "exit") != "exit":
            return


def bound_resources(limits: dict[str, Any]) -> None:
    memory, processes = limits["memory"], limits["processes"]
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, FILES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    if limits["isolation"] != "rlimits":  # there it counts all processes of the user
        resource.setrlimit(resource.RLIMIT_NPROC, (processes + 2, processes + 2))


def run(
    request: dict[str, Any], limits: dict[str, Any], others: Callable[[], list[int]]
) -> dict[str, Any]:
    """Run one program to its end or to a limit."""
    pipes = [os.pipe() for _ in range(3)]  # its output, its errors, and whether it has passed
    token = os.urandom(16)
    standard_input = os.memfd_create("stdin")
    os.write(standard_input, request.get("stdin", "").encode())
    os.lseek(standard_input, 0, os.SEEK_SET)
    deadline = time.monotonic() + request["seconds"]
    child = os.fork()
    if child == 0:
        for target, descriptor in enumerate((standard_input, *(pipe[1] for pipe in pipes))):
            os.dup2(descriptor, target)
        os.closerange(4, 64)
        be_the_program(request, token)
    os.close(standard_input)
    for _, end in pipes:
        os.close(end)
    found = [b"", b"", b""]
    ended, code = watch(child, [start for start, _ in pipes], found, deadline, limits, others)
    for start, _ in pipes:
        os.close(start)
    return {
        "ended": ended,
        "code": code,
        "stdout": found[0][:OUTPUT].decode(errors="replace"),
        "stderr": found[1][:OUTPUT].decode(errors="replace"),
        "passed": found[2] == token,
    }


def watch(
    child: int,
    pipes: list[int],
    found: list[bytes],
    deadline: float,
    limits: dict[str, Any],
    others: Callable[[], list[int]],
) -> tuple[str, int | None]:
    """Read what the child writes until it ends or exceeds a limit; says which, and its code."""
    poll = select.poll()
    names = {descriptor: index for index, descriptor in enumerate(pipes)}
    for descriptor in pipes:
        os.set_blocking(descriptor, False)
        poll.register(descriptor, select.POLLIN)
    process = os.pidfd_open(child)
    poll.register(process, select.POLLIN)
    looked = 0.0
    try:
        while True:
            for descriptor, _ in poll.poll(POLL * 1000):
                if descriptor in names and not take(descriptor, found, names[descriptor]):
                    poll.unregister(descriptor)
            status = reap(child)
            if status is not None:
                for descriptor, index in names.items():
                    while len(found[index]) <= OUTPUT and take(descriptor, found, index):
                        pass
            if max(map(len, found)) > OUTPUT:
                return "output", None
            if status is not None:
                return "exit", os.waitstatus_to_exitcode(status)
            now = time.monotonic()
            if now > deadline:
                return "time", None
            if now - looked > POLL:
                looked = now
                pids = others()
                if len(pids) > limits["processes"]:
                    return "processes", None
                if sum(map(resident_bytes, pids)) > limits["memory"]:
                    return "memory", None
    finally:
        os.close(process)


def take(descriptor: int, found: list[bytes], index: int) -> bool:
    """Read what there is; whether more may come."""
    try:
        part = os.read(descriptor, OUTPUT)
    except BlockingIOError:
        return False
    found[index] += part
    return bool(part)


def reap(child: int) -> int | None:
    """Collect every process that has ended; the status of `child` if it is among them."""
    status = None
    while True:
        try:
            process, code = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if process == 0:
            return status
        if process == child:
            status = code


def everybody_else() -> list[int]:
    """All processes of the PID namespace but this one."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def descendants() -> list[int]:
    """This process's children and theirs; orphans among them are its own children."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            parents.setdefault(int(fields[1]), []).append(int(name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def end_descendants() -> None:
    while found := descendants():
        for process in found:
            os.kill(process, signal.SIGKILL)
        reap(0)


def resident_bytes(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return 0  # it has ended meanwhile


# ---------------------------------------------------------------- inside a program's process


def be_the_program(request: dict[str, Any], token: bytes) -> None:
    """Run the program in this process and end it as Python ends a program. With `tests` the program
    is a module that they use, and `token` says that all have passed."""
    seconds = int(request["seconds"]) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.argv = ["answer.py"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    site.setquit()  # exit() and quit(), which -S leaves out
    main_module = types.ModuleType("__main__" if "tests" not in request else "answer")
    sys.modules[main_module.__name__] = main_module
    program = os.getpid()
    code = 1
    try:
        execute("answer.py", request["program"], main_module.__dict__)
        for number, test in enumerate(request.get("tests", ()), start=1):
            execute(f"test_{number}.py", test, main_module.__dict__)
        if "tests" in request and os.getpid() == program:  # a fork of it runs through here as well
            sys.stdout.flush()
            os.write(3, token)
        code = 0
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]  # whatever the program gave: Python judges it
    except BaseException as error:  # whatever the program raises
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
    sys.exit(code)


def execute(name: str, text: str, namespace: dict[str, Any]) -> None:
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), namespace)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(str(error))
