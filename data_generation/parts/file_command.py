"""What the commands that make files out of files share: outputs appear whole or not at all, errors are one line."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from parts.json_lines import JsonLines, draft_path, replace_file
from parts.prompt_files import InputError


def check_paths(inputs: Sequence[Path], outputs: Sequence[Path], overwrite: bool) -> None:
    """Checks before any work that all files can be read and written, and makes the outputs' directories.

    Raises:
        InputError: If an input is missing, a file is named twice, or an output is there already.
    """
    for path in inputs:
        if not path.is_file():
            raise InputError(f"found no file {path}, expected one to read; check --data_path")
    named = [*inputs, *outputs]
    for index, path in enumerate(named):
        if path.resolve() in [other.resolve() for other in named[:index]]:
            raise InputError(f"found {path} named twice, expected different files; name another one")
    for path in outputs:
        if path.is_dir() or (path.exists() and not overwrite):
            raise InputError(f"found {path} there already, expected a new file; choose another one or add --overwrite")
        path.parent.mkdir(parents=True, exist_ok=True)


def write_whole(path: Path, lines: Iterable[bytes]) -> None:
    """Writes a file that appears when all of its lines are there; after an error nothing is left of it."""
    try:
        replace_file(path, lines)
    finally:
        draft_path(path).unlink(missing_ok=True)


def write_whole_with_failures(path: Path, lines: Iterable[bytes], failures: JsonLines, failed_path: Path) -> None:
    """Writes a file, and beside it what making its lines wrote into `failures`; after an error nothing is left of either.

    Args:
        path: The file to write.
        lines: Its lines; making them may write into `failures`.
        failures: A draft of the rows that could not be used.
        failed_path: Where the draft goes if it has rows; without, an earlier file there is removed.
    """
    failures.path.unlink(missing_ok=True)
    try:
        write_whole(path, lines)
        failed_path.unlink(missing_ok=True)
        if failures.path.exists():
            failures.path.replace(failed_path)
    finally:
        failures.close()
        failures.path.unlink(missing_ok=True)


def run_command(run: Callable[[], int], say: Callable[[str], None]) -> int:
    """Runs a command, and says what went wrong; returns its exit code, 2 after an error, 130 after Ctrl-C."""
    try:
        return run()
    except (InputError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; no output was written")
        return 130
