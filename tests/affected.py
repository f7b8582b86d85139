"""Print the test files that belong to what has changed since the last commit, for `make check`."""

from pathlib import Path

from mlkit.jobs.import_graph import changed_files

REPOSITORY = Path(__file__).resolve().parents[1]


def files_of_tests(
    changed: set[Path],  # absolute
    root: Path,
) -> list[Path]:  # sorted; the architecture test is always among them
    """The changed test files, and of each changed module the test file of its name."""
    tests = {root / "tests" / "test_architecture.py"}
    for path in (path.relative_to(root) for path in changed):
        if path.parts[0] == "mlkit" and path.suffix == ".py":
            tests.add(root / "tests" / Path(*path.parts[1:-1]) / f"test_{path.stem.strip('_')}.py")
            tests.add(root / "tests" / "core" / f"test_{path.stem.strip('_')}.py")
        elif path.parts[0] == "tests" and path.name.startswith("test_"):
            tests.add(root / path)
    return sorted(path for path in tests if path.is_file())


if __name__ == "__main__":
    print(*files_of_tests(changed_files(REPOSITORY), REPOSITORY), sep="\n")
