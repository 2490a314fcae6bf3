"""Drives hotstart-fold: freeze a tree, lay its memory out, copy, map back; `release` or exact undo."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import IO

from hotstart.adapters.linux.native import native_program
from hotstart.errors import FoldRefused
from hotstart.snapshot.capture import FoldedProcess
from hotstart.snapshot.layout import Area, Block, Comparison, Layout, comparisons, lay_out, parse_smaps


class Fold:
    """A fold under way: a context manager that undoes everything unless `release` was called.

    The processes stand still from construction until release or exit.
    """

    def __init__(
        self,
        root_pid: int,
        folder: str,
        inside: str,
        threads: int,
        why_unsafe: Callable[[int], str | None] = lambda _: None,
    ) -> None:
        """Freeze the tree below `root_pid`; `why_unsafe` says of a pid why it must not be mapped.

        Raises FoldRefused if it cannot be frozen.
        """
        self._why_unsafe = why_unsafe
        try:
            self._folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as e:
            raise FoldRefused(f"its folder for memory files cannot be opened: {folder}: {e.strerror}") from e
        self._program = subprocess.Popen(
            [native_program("hotstart-fold"), str(root_pid), str(self._folder_fd), inside, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._folder_fd,),
            start_new_session=True,  # an interrupt of the terminal must not hit it in the middle: end of file undoes
        )
        assert self._program.stdin is not None
        assert self._program.stdout is not None
        self._orders: IO[bytes] = self._program.stdin
        self._answers: IO[bytes] = self._program.stdout
        try:
            self.pids = [int(line.split()[1]) for line in self._until("frozen") if line.startswith("process")]
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __enter__(self) -> Fold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # it may have refused and left with orders unread
            self._orders.close()
        self._program.wait()
        self._answers.close()
        os.close(self._folder_fd)

    def map_memory(self, name_of: Callable[[int], str]) -> list[FoldedProcess]:
        """Copy and map every process's memory; `name_of(i)` names the memory file of the i-th process.

        Raises FoldRefused, with all processes as they were, for example when the disk is full.
        """
        unsafe = {pid: self._why_unsafe(pid) for pid in self.pids}
        layouts = self._lay_out_all(unsafe)
        names = {pid: name_of(i) for i, pid in enumerate(self.pids)}
        orders = []
        for pid, layout in layouts.items():
            if not layout.placed:
                continue
            orders.append(f"process {pid} {names[pid]} {layout.size_bytes:x}\n")
            orders += [
                f"area {p.area.start:x} {p.area.end:x} {p.offset:x} {p.protection_bits:x} {int(p.whole)} {p.advice} "
                f"{0 if p.base is None else self.pids[p.base]}\n"
                for p in layout.placed
            ]
        self._say(*orders, "go\n")
        copied = {int(pid): int(size) for word, pid, size in map(str.split, self._until("folded")) if word == "copied"}
        return [
            FoldedProcess(
                _inner_pid(pid), names[pid] if layout.data_end else None, layout, copied.get(pid, 0), unsafe[pid]
            )
            for pid, layout in layouts.items()
        ]

    def release(self) -> None:
        """Free the old memory and let every process go on."""
        self._orders.write(b"release\n")
        self._orders.flush()
        for _ in self._until("released"):
            pass

    def _lay_out_all(self, unsafe: Mapping[int, str | None]) -> dict[int, Layout]:
        layouts: dict[int, Layout] = {}
        for pid in self.pids:
            areas = _read_areas(pid)
            wanted = comparisons(areas, tuple(layouts.values())) if unsafe[pid] is None else []
            layouts[pid] = lay_out(areas, unsafe[pid], self._compare(pid, wanted) if wanted else ())
        return layouts

    def _compare(self, pid: int, wanted: list[Comparison]) -> list[Block]:
        orders = [f"compare {pid} {self.pids[c.base]} {c.start:x} {c.end:x} {int(c.whole)}\n" for c in wanted]
        self._say(*orders, "answer\n")
        place = {base: i for i, base in enumerate(self.pids)}
        asked = iter(wanted)
        comparison = next(asked)
        blocks: list[Block] = []
        for line in self._until("compared"):
            _, _, base, start, end, same, different, zero = line.split()
            at = int(start, 16)
            while comparison.base != place[int(base)] or not comparison.start <= at < comparison.end:
                comparison = next(asked)
            offset = comparison.offset + at - comparison.start
            blocks.append(Block(comparison.base, at, int(end, 16), offset, int(same), int(different), int(zero)))
        return blocks

    def _say(self, *lines: str) -> None:
        try:
            self._orders.write("".join(lines).encode())
            self._orders.flush()
        except BrokenPipeError:
            pass  # it refused and left; its reason is the next thing to read

    def _until(self, last: str) -> list[str]:
        lines: list[str] = []
        for raw in self._answers:
            line = raw.decode().strip()
            if line == last:
                return lines
            if line.startswith("refused"):
                raise FoldRefused(line.partition(" ")[2])
            lines.append(line)
        raise FoldRefused("the fold program ended unexpectedly")


def _read_areas(pid: int) -> list[Area]:
    with open(f"/proc/{pid}/smaps", "rb") as f:
        return parse_smaps(f.read())


def _inner_pid(pid: int) -> int:
    with open(f"/proc/{pid}/status", "rb") as f:
        for line in f:
            if line.startswith(b"NSpid:"):
                return int(line.split()[-1])
    return pid
