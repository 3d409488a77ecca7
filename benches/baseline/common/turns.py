"""The programs of a comparison: the engine, started anew for every round, and peers, which stay and wait for their turn.

Standard library only. A program that is refused, fails or does not answer in time raises NotRun; the others go on.
"""

import json
import os
import selectors
import signal
import subprocess
import tempfile
import time


class NotRun(Exception):
    """A program is left out; the text says why."""


def last_line(text, fallback):
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else fallback


def stop(process):
    """Ends a process and all that it has started, and waits for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


class Engine:
    """`mlnt`: golden steps first, then one process for each round."""

    def __init__(self, verify, bench, limit):
        self.verify, self.bench, self.limit = verify, bench, limit

    def start(self):
        start = time.monotonic()
        self.output(self.verify)
        return {"check": "mlnt verify", "check_seconds": time.monotonic() - start}

    def round(self):
        found = first_object(reversed(self.output(self.bench).splitlines()))
        if found is None:
            raise NotRun("printed no JSON object")
        taken, steps = found.get("taken"), found.get("steps")
        # `True == 1`: an older program said so of its last step alone.
        if isinstance(taken, bool) or not isinstance(taken, int) or taken != steps:
            raise NotRun(f"not every timed step is said to be taken (taken: {taken}, steps: {steps}): the times mean nothing")
        return found

    def output(self, command):
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
                )
            except OSError as error:
                raise NotRun(f"{command[0]}: {error.strerror}") from None
            try:
                status = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                raise NotRun(f"{command[1]}: no end within {self.limit:.0f} s") from None
            finally:
                stop(process)
            out.seek(0)
            err.seek(0)
            said = out.read()
            if status != 0:
                raise NotRun(f"{command[1]}: {last_line(err.read(), f'exit status {status}')}")
            return said

    def close(self):
        pass


def first_object(lines):
    """The first line that is a JSON object, or None: libraries, too, print."""
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


class Served:
    """A peer that checks itself, gets ready, and times a round for every line it is sent."""

    def __init__(self, command, limit):
        self.command, self.limit = command, limit
        self.process, self.pending = None, b""

    def start(self):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise NotRun(f"{self.command[0]}: {error.strerror}") from None
        return self.answer()

    def round(self):
        try:
            self.process.stdin.write(b"\n")
        except BrokenPipeError:
            raise NotRun(self.why()) from None
        return self.answer()

    def answer(self):
        """The next line that is a JSON object."""
        deadline = time.monotonic() + self.limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                found = first_object(self.lines())
                if found is not None:
                    return found
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise NotRun(f"no answer within {self.limit:.0f} s")
                data = os.read(self.process.stdout.fileno(), 65536)
                if not data:
                    raise NotRun(self.why())
                self.pending += data

    def lines(self):
        """The lines that have come whole, each once."""
        while b"\n" in self.pending:
            line, _, self.pending = self.pending.partition(b"\n")
            yield line

    def why(self):
        """Why the process ended."""
        status = self.process.wait()
        self.errors.seek(0)
        return last_line(self.errors.read(), f"exit status {status}")

    def close(self):
        if self.process is not None:
            stop(self.process)
            self.process.stdin.close()
            self.process.stdout.close()
            self.errors.close()


START_SHARE = 0.75  # of all the time, for starts; the rest is for rounds


def take_turns(programs, rounds, say, budget=float("inf")):
    """Starts all programs, runs `rounds` rounds of each in turn and ends them. Every other round goes backwards, so that
    no program always stands behind the same one.

    programs: {label: Engine or Served}. After `budget` seconds no further round is begun. Returns ({label: (what it said
    at the start, its rounds)}, {label: why not}).
    """
    done, left_out = {}, {}
    begin = time.monotonic()

    def attempt(label, action):
        try:
            return action()
        except NotRun as why:
            left_out[label] = str(why)
            done.pop(label, None)
            programs[label].close()
            say(f"{label}: not run: {why}")

    try:
        for label, program in programs.items():
            start = time.monotonic()
            limit, left = program.limit, begin + START_SHARE * budget - start
            program.limit = min(limit, max(left, 1.0))
            about = attempt(label, program.start)
            program.limit = limit
            if about is not None:
                done[label] = (about, [])
                say(f"{label}: right by the golden steps, ready after {time.monotonic() - start:.0f} s")
        for round_ in range(rounds):
            if round_ > 0 and time.monotonic() - begin > budget:
                say(f"only {round_} rounds: the time is over")
                break
            for label in list(done) if round_ % 2 == 0 else list(reversed(done)):
                found = attempt(label, programs[label].round)
                if found is not None:
                    done[label][1].append(found)
    finally:
        for label in done:
            programs[label].close()
    return done, left_out
