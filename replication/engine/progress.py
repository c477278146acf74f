"""Progress bars: in notebooks, in terminals, and as plain lines elsewhere."""

import contextlib
import sys

import tqdm.auto
import tqdm.autonotebook
import tqdm.std

LINE_SECONDS = 180  # between lines of progress where the output is no terminal
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"  # without the rate: it fits 80 columns


class _Lines(tqdm.std.tqdm):
    """A bar for files and pipes: a plain line at the start, then one every few minutes."""

    def __init__(self, **options):
        line = "{desc}: {n_fmt} of {total_fmt}{unit}, {elapsed} gone, {remaining} left{postfix}"
        super().__init__(**options, mininterval=LINE_SECONDS, miniters=0, bar_format=line)

    def display(self, msg=None, pos=None):
        if msg is None:  # tqdm displays an empty text to erase a bar; lines stay
            self.fp.write(f"{self}\n")
            self.fp.flush()


@contextlib.contextmanager
def progress_bar(total, title, unit, disable=False, initial=0):
    """A tqdm bar that disappears at the end, or plain lines where the output is no terminal.

    initial: how much of the total is already done.
    A closed widget would stay in the executed copy of a notebook as the text of an empty bar: it is removed here.
    """
    options = {"total": total, "desc": title, "unit": f" {unit}", "leave": False}
    options |= {"disable": disable, "initial": initial}
    if disable or tqdm.autonotebook.tqdm is tqdm.std.tqdm:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        with tqdm.auto.tqdm(**options, bar_format=BAR) if terminal else _Lines(**options) as bar:
            yield bar
        return
    from IPython.display import display

    with tqdm.auto.tqdm(**options, display=False) as bar:
        shown = display(bar.container, display_id=True)
        try:
            yield bar
        finally:
            shown.update({"text/plain": ""}, raw=True)


def in_words(seconds):
    """A time as text: "40 s", "12 min", "3.5 hours", "2.1 days", "1.4 years"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    for unit, length, limit in (("min", 60, 100), ("hours", 3600, 48), ("days", 86_400, 500)):
        if seconds < limit * length:
            return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}"
    return f"{seconds / 31_557_600:.1f} years"
