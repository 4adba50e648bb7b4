"""Feed the parsers with inputs that are nearly valid, and count what else than `InputError` comes out.

    python benchmarks/fuzz.py --count 1000000
    python benchmarks/fuzz.py --count 20000 --targets features_hdf5 --engine atheris

Every input is a seed of `benchmarks/fuzz_targets.py` after one to eight changes: bits, bytes, numbers at their limits,
pieces cut, doubled or moved, words of the format, parts of other seeds. With `--engine atheris` (pip install atheris)
the changes are those of libFuzzer, led by the branches that they reach. Work is done by child processes, so that a
crash of a C library is counted and the rest goes on. The printed JSON line holds the inputs and what was found for
each parser; inputs that were not handled are kept in `--out`. The exit status is 1 where there are any.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

CHUNK = 25_000  # inputs of one child process
PATIENCE = 20  # seconds that one input may take
PACKAGES = ("frugalpath", "benchmarks.fuzz_targets")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="inputs over all parsers, by their shares")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--targets", nargs="+", help="some of the parsers")
    parser.add_argument("--engine", choices=("mutate", "atheris"), default="mutate")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/fuzz", help="folder for inputs that were not handled")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


class Hang(BaseException):
    """An input took longer than `PATIENCE`."""


def mutate(seeds: Sequence[bytes], words: Sequence[bytes], rng: random.Random) -> bytes:
    """A seed after one to eight changes."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 8)):
        at, to = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
        match rng.randrange(9 if words else 7):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                del data[at : min(to, at + rng.choice((1, 4, 64, 4096)))]
            case 3:
                data[at:at] = data[at : min(to, at + 256)] * rng.choice((1, 2, 30))
            case 4:
                other = rng.choice(seeds)
                data[at:to] = other[rng.randint(0, len(other)) :][: rng.choice((4, 64, 4096))]
            case 5:
                form = rng.choice("bBhHiIqQ")
                number = rng.choice((0, 1, -1, 2**7, 2**15, 2**31, 2**63)) % 2 ** (8 * struct.calcsize(form))
                data[at : at + struct.calcsize(form)] = number.to_bytes(
                    struct.calcsize(form), rng.choice(("little", "big"))
                )
            case 6:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case 7:
                data[at:at] = rng.choice(words)
            case 8:
                data[at : min(to, at + 16)] = rng.choice(words)
    return bytes(data[:60_000])


class Child:
    """Runs one parser on inputs and writes down what happens, so that nothing is lost when the process dies."""

    def __init__(self, run: Callable[[bytes], object], handled: type[Exception], folder: Path):
        self.run, self.handled, self.folder = run, handled, folder
        self.count = 0
        self.slowest = 0.0
        self.found: Counter[str] = Counter()
        self.current = os.open(folder / "current", os.O_RDWR | os.O_CREAT)

    def __call__(self, data: bytes) -> None:
        os.pwrite(self.current, struct.pack("<QQ", self.count, len(data)) + data, 0)
        started = time.perf_counter()
        try:
            self.run(data)
        except self.handled:
            pass
        except (Exception, Hang) as error:
            self._keep(error, data)
        self.slowest = max(self.slowest, time.perf_counter() - started)
        self.count += 1
        if self.count % 500 == 0:
            self.write()

    def _keep(self, error: BaseException, data: bytes) -> None:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
        last = next((f for f in reversed(frames) if "benchmarks" not in f.filename), frames[-1])
        name = f"{type(error).__name__} at {Path(last.filename).relative_to(ROOT)}:{last.lineno}"
        if name not in self.found:
            (self.folder / f"input{len(self.found)}").write_bytes(data)
            (self.folder / f"trace{len(self.found)}").write_text("".join(traceback.format_exception(error)))
        self.found[name] += 1
        self.write()

    def write(self) -> None:
        """What is known so far."""
        result = {"count": self.count, "found": self.found, "slowest_s": round(self.slowest, 3)}
        (self.folder / "result").write_text(json.dumps(result))


def child(name: str, count: int, seed: int, engine: str, folder: Path) -> None:
    """Body of a child process."""
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=list(PACKAGES)):
            from benchmarks.fuzz_targets import targets
    else:
        from benchmarks.fuzz_targets import targets
    from frugalpath.errors import InputError

    target = targets()[name]
    logging.disable()
    with suppress(InputError):
        target.run(target.seeds[0])  # imports are no part of an input's time
    ready = Child(target.run, InputError, folder)
    if engine == "atheris":
        corpus = folder / "corpus"
        corpus.mkdir()
        for i, data in enumerate(target.seeds):
            (corpus / str(i)).write_bytes(data)
        escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words if len(word) < 100)
        if target.words:
            (folder / "words").write_text("".join(f'"{word}"\n' for word in escaped))
        flags = [f"-runs={count}", f"-seed={seed + 1}", "-max_len=20000", f"-timeout={PATIENCE}", "-rss_limit_mb=0"]
        flags += [f"-dict={folder / 'words'}"] if target.words else []
        flags += [f"-artifact_prefix={folder}/", str(corpus)]

        def one(data: bytes) -> None:
            ready(data)
            if ready.count >= count:  # libFuzzer ends the process
                ready.write()

        atheris.Setup(["fuzz", *flags], one)
        atheris.Fuzz()
    rng = random.Random(f"{name} {seed}")

    def stop(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    for _ in range(count):
        data = mutate(target.seeds, target.words, rng)
        signal.alarm(PATIENCE)
        ready(data)
        signal.alarm(0)
    ready.write()


def work(name: str, count: int, seed: int, engine: str, out: Path, until: float) -> dict:
    """Run a parser on `count` inputs in child processes, a new one after each that dies."""
    total: dict = {"inputs": 0, "found": Counter(), "slowest_s": 0.0}
    while total["inputs"] < count and time.monotonic() < until:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as place:
            folder = Path(place)
            job = json.dumps([name, count - total["inputs"], seed + total["inputs"], engine, place])
            command = [sys.executable, __file__, "--child", job]
            paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, "TMPDIR": place, "PYTHONWARNINGS": "ignore", "PYTHONPATH": paths}
            status, told = watch(command, environment, folder)
            result = json.loads(text) if (text := _read(folder / "result")) else {"count": 0, "found": {}}
            count_file = folder / "current"
            head = count_file.read_bytes() if count_file.exists() else b""
            if not head:
                raise RuntimeError(f"{name}: the child process did not start:\n{told[-3000:]}")
            at, size = struct.unpack("<QQ", head[:16])
            if result["count"] <= at and status:  # it died in this input
                result["found"] = {**result["found"], f"died with status {status}": 1}
                result["count"] = at + 1
                (folder / "input99").write_bytes(head[16 : 16 + size])
                (folder / "trace99").write_text(told[-5000:])
            for file in (*folder.glob("input*"), *folder.glob("trace*")):
                out.mkdir(parents=True, exist_ok=True)
                (out / f"{name}-{seed + total['inputs']}-{file.name}").write_bytes(file.read_bytes())
            total["inputs"] += result["count"]
            total["found"].update(result["found"])
            total["slowest_s"] = max(total["slowest_s"], result.get("slowest_s", 0.0))
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "done.jsonl", "a") as file:
        file.write(json.dumps({"name": name, "seed": seed, **total}) + "\n")
    return {"name": name, **total}


def watch(command: Sequence[str], environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """Wait for a child, and end it where one input keeps it in a C library for long; its status and messages."""
    with open(folder / "messages", "w+") as messages:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=messages)
        before = b""
        while True:
            try:
                status = process.wait(10 * PATIENCE)
                break
            except subprocess.TimeoutExpired:
                now = (folder / "current").read_bytes()[:8] if (folder / "current").exists() else b""
                if now and now == before:
                    process.kill()
                before = now
        messages.seek(0)
        return status, messages.read()


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def main() -> None:
    """Share the inputs out, and print what came of them."""
    arguments = parse()
    if arguments.child:
        name, count, seed, engine, folder = json.loads(arguments.child)
        return child(name, count, seed, engine, Path(folder))
    from benchmarks.fuzz_targets import targets

    known = {n: t for n, t in targets().items() if not arguments.targets or n in arguments.targets}
    whole = sum(t.share for t in known.values())
    started = time.monotonic()
    until = started + arguments.seconds
    jobs = []
    for name, target in known.items():
        left, part = -(-arguments.count * target.share // whole), 0
        while left > 0:
            jobs.append(
                (name, int(min(left, CHUNK)), arguments.seed + part, arguments.engine, Path(arguments.out), until)
            )
            left, part = left - CHUNK, part + 10**7
    found: dict[str, dict] = {name: {"inputs": 0, "found": Counter(), "slowest_s": 0.0} for name in known}
    with ThreadPoolExecutor(arguments.processes) as pool:
        for result in pool.map(lambda job: work(*job), jobs):
            row = found[result["name"]]
            row["inputs"] += result["inputs"]
            row["found"].update(result["found"])
            row["slowest_s"] = max(row["slowest_s"], result["slowest_s"])
    unhandled = sum(sum(row["found"].values()) for row in found.values())
    total = {"inputs": sum(row["inputs"] for row in found.values()), "unhandled": unhandled}
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({**total, "seconds": seconds, "engine": arguments.engine, "parsers": found}))
    sys.exit(1 if unhandled else 0)


if __name__ == "__main__":
    main()
