"""Run a command in a terminal that is nobody's, and draw what stands on its screen."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from pathlib import Path

COLUMNS, ROWS = 96, 50
_ESCAPE = re.compile(
    r"\x1b\[([?>]?)([0-9;]*)([A-Za-z])|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[()][A-Z0-9]|\x1b."
)
#: The sixteen colours of a terminal on a dark ground.
PALETTE = (
    "#3b4252 #e06c75 #98c379 #e5c07b #61afef #c678dd #56b6c2 #d8dee9 "
    "#7f8794 #ef8891 #b2d89a #f0d399 #8bc5f7 #d7a1e8 #80ccd6 #ffffff"
).split()
GROUND, INK, PROMPT = "#1e222a", "#d8dee9", "#98c379"


@dataclass(frozen=True)
class Style:
    """How a character looks."""

    colour: str = INK
    bold: bool = False
    dim: bool = False


@dataclass
class Screen:
    """What a terminal shows: lines of (character, style), as many as were written."""

    columns: int = COLUMNS
    lines: list[list[tuple[str, Style]]] = field(default_factory=lambda: [[]])
    row: int = 0
    column: int = 0
    style: Style = Style()

    def feed(self, text: str) -> None:
        """Take what a program wrote."""
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                found = _ESCAPE.match(text, at)
                if found is None:
                    at += 1
                    continue
                self._escape(found)
                at = found.end()
                continue
            self._character(text[at])
            at += 1

    def _character(self, character: str) -> None:
        if character == "\n":
            self._down(1)
        elif character == "\r":
            self.column = 0
        elif character == "\b":
            self.column = max(0, self.column - 1)
        elif character == "\t":
            self.column = (self.column // 8 + 1) * 8
        elif character.isprintable() and not unicodedata.combining(character):
            if self.column >= self.columns:
                self._down(1)
                self.column = 0
            line = self.lines[self.row]
            line.extend([(" ", Style())] * (self.column + 1 - len(line)))
            line[self.column] = (character, self.style)
            self.column += 1

    def _down(self, count: int) -> None:
        self.row += count
        while self.row >= len(self.lines):
            self.lines.append([])

    def _escape(self, found: re.Match[str]) -> None:
        private, numbers, kind = found[1], found[2], found[3]
        if kind is None or private:
            return
        values = [int(number or 0) for number in numbers.split(";")] if numbers else []
        count = max(1, values[0]) if values else 1
        if kind == "m":
            self._colours(values or [0])
        elif kind == "A":
            self.row = max(0, self.row - count)
        elif kind == "B":
            self._down(count)
        elif kind == "C":
            self.column += count
        elif kind == "D":
            self.column = max(0, self.column - count)
        elif kind == "G":
            self.column = count - 1
        elif kind == "K":
            line = self.lines[self.row]
            del line[0 if values and values[0] == 2 else self.column :]
        elif kind == "J":
            del self.lines[self.row + 1 :]
            del self.lines[self.row][self.column :]

    def _colours(self, values: Sequence[int]) -> None:
        colour, bold, dim = self.style.colour, self.style.bold, self.style.dim
        queue = list(values)
        while queue:
            value = queue.pop(0)
            if value == 0:
                colour, bold, dim = INK, False, False
            elif value in (1, 2, 22):
                bold, dim = value == 1, value == 2
            elif 30 <= value <= 37:
                colour = PALETTE[value - 30]
            elif 90 <= value <= 97:
                colour = PALETTE[value - 82]
            elif value == 39:
                colour = INK
            elif value in (38, 48) and queue[:1] == [5]:
                colour = _of_256(queue[1]) if value == 38 else colour
                del queue[:2]
            elif value in (38, 48) and queue[:1] == [2]:
                colour = "#{:02x}{:02x}{:02x}".format(*queue[1:4]) if value == 38 else colour
                del queue[:4]
        self.style = Style(colour, bold, dim)

    def text(self) -> str:
        """What stands there, without colours."""
        return "\n".join("".join(c for c, _ in line).rstrip() for line in self.lines).rstrip() + "\n"


def _of_256(number: int) -> str:
    if number < 16:
        return PALETTE[number]
    if number >= 232:
        return "#{0:02x}{0:02x}{0:02x}".format(8 + 10 * (number - 232))
    steps = (0, 95, 135, 175, 215, 255)
    number -= 16
    return f"#{steps[number // 36]:02x}{steps[number // 6 % 6]:02x}{steps[number % 6]:02x}"


@dataclass(frozen=True)
class Run:
    """What a command did."""

    code: int
    seconds: float
    raw: str


def run(
    command: Sequence[str],
    cwd: Path,
    typed: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    show: Callable[[str], None] | None = None,
) -> Run:
    """Run a command in a pseudo terminal.

    Args:
        command: The words.
        cwd: Where.
        typed: Lines to type, each once the screen ends in a prompt ("> ").
        environment: Variables set for it.
        show: Called with what it writes, as it comes.
    """
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), **(environment or {})}
    variables.pop("NO_COLOR", None)
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=variables,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    os.close(follower)
    waiting, raw = list(typed), b""
    while True:
        ready, _, _ = select.select([leader], [], [], 0.2)
        if ready:
            try:
                piece = os.read(leader, 1 << 16)
            except OSError:  # the last one that held the terminal has left
                break
            if not piece:
                break
            raw += piece
            if show is not None:
                show(piece.decode("utf-8", "replace"))
        elif process.poll() is not None:
            break
        last = _ESCAPE.sub("", raw[-200:].decode("utf-8", "replace"))
        if waiting and last.endswith("> "):
            line = waiting.pop(0)
            os.write(leader, line.encode() + b"\n")
            raw += b""
            time.sleep(0.3)  # until its echo is there
    code = process.wait()
    os.close(leader)
    return Run(code, time.monotonic() - begun, raw.decode("utf-8", "replace").replace("\r\n", "\n\r"))


def draw(screen: Screen, place: Path, title: str = "") -> None:
    """Write a PNG of a screen, as tall as what stands on it."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    size = 22
    plain = ImageFont.truetype(str(fonts / "DejaVuSansMono.ttf"), size)
    strong = ImageFont.truetype(str(fonts / "DejaVuSansMono-Bold.ttf"), size)
    wide, tall, edge, bar = plain.getlength("M"), int(size * 1.3), 24, 44
    lines = screen.lines
    while lines and not "".join(c for c, _ in lines[-1]).strip():
        lines = lines[:-1]
    columns = max(max(map(len, lines), default=0), 60)
    picture = Image.new("RGB", (int(columns * wide) + 2 * edge, len(lines) * tall + bar + 2 * edge), GROUND)
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 0, picture.width, bar), fill="#2b303b")
    for number, colour in enumerate(("#e06c75", "#e5c07b", "#98c379")):
        pen.ellipse((20 + 28 * number, 14, 36 + 28 * number, 30), fill=colour)
    pen.text((picture.width / 2, bar / 2), title, font=plain, fill="#7f8794", anchor="mm")
    for row, line in enumerate(lines):
        for column, (character, style) in enumerate(line):
            if character == " ":
                continue
            at = (edge + column * wide, bar + edge + row * tall)
            colour = PALETTE[8] if style.dim else style.colour
            pen.text(at, character, font=strong if style.bold else plain, fill=colour)
    place.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(48).save(place, optimize=True)


if __name__ == "__main__":
    done = run(sys.argv[2:], Path.cwd())
    shown = Screen()
    shown.feed(done.raw)
    draw(shown, Path(sys.argv[1]), sys.argv[2])
    sys.exit(done.code)
