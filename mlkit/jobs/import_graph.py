"""Import graph of a project: which notebooks depend, directly or indirectly, on files that have changed."""

# Imports are read off the code: lazy ones, those in strings of code, and what `python -m` starts. Where a name comes
# through a package that loads lazily, the stub beside it (__init__.pyi) says from which module; without one, the whole
# package counts. What a notebook imports that is executed by its name, as a job, is not seen.

import ast
import itertools
import re
import subprocess
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from mlkit.errors import InputError
from mlkit.jobs.notebook import read_notebook

AFFECTS_ALL = {"conftest.py", "pyproject.toml", "requirements.lock", "settings.ini"}  # files that affect every notebook


class ImportGraph:
    """Imports between the files of a project."""

    def __init__(
        self,
        root: Path,  # the project's folder
        files: Iterable[Path],  # files of the project, deleted ones included
    ):
        self.root = root
        self.modules = {_module_name(path.relative_to(root)): path for path in files if path.suffix == ".py"}
        packages = {name.partition(".")[0] for name in self.modules} - {"tests", ""}
        name = rf"((?:{'|'.join(map(re.escape, packages)) or '(?!)'})(?:\.\w+)+)"
        self._in_text = re.compile(rf"\b(?:from|import)\s+{name}|\A{name}(?::\w+)?\Z")  # code, or the name itself
        self._data_folders = {
            root / folder: self.modules[package].parent for folder, package in _data(root, self.modules)
        }
        self._direct: dict[Path, set[Path]] = {}

    def imports(
        self,
        path: Path,
    ) -> set[Path]:
        """Files on which a module or a notebook depends, directly or indirectly, and the file itself."""
        reached, new = {path}, {path}
        while new:
            new = set().union(*(self._imports_of(file) for file in new)) - reached
            reached |= new
        return reached

    def _imports_of(self, path: Path) -> set[Path]:
        if path not in self._direct:
            name = _module_name(path.relative_to(self.root)) if path.suffix == ".py" else ""
            self._direct[path] = self._references(_tree(path), name, path)
        return self._direct[path]

    def _references(self, tree: ast.AST, name: str, path: Path) -> set[Path]:
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        nodes = _executed_nodes(tree)
        attributes, matches = _used_attributes(nodes), set()
        for node in nodes:
            match node:
                case ast.Import():
                    for alias in node.names:
                        matches |= self._module_files(alias.name, attributes[alias.asname or alias.name])
                case ast.ImportFrom():
                    module = _absolute_name(node, package)
                    for alias in node.names:
                        matches |= self._name_files(module, alias.name, attributes[alias.asname or alias.name])
                case ast.Constant(value=str(text)):
                    for match in self._in_text.finditer(text):
                        matches |= self._module_files(match[1] or match[2], set())
                case ast.List(elts=parts) | ast.Tuple(elts=parts) | ast.Call(args=parts):
                    values = [part.value if isinstance(part, ast.Constant) else None for part in parts]
                    for flag, module in itertools.pairwise(values):
                        if flag == "-m" and isinstance(module, str):  # python -m module
                            matches |= self._module_files(module, set()) | self._module_files(
                                f"{module}.__main__", set()
                            )
        return matches

    def _module_files(self, module: str, attributes: set[str]) -> set[Path]:
        """Files that `import module` imports when these attributes of it are used; no attributes: all may be used."""
        parts = module.split(".")
        parents = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        files = {self.modules[name] for name in parents if name in self.modules}
        if module in self.modules and self._is_lazy(module):
            for name in attributes:
                files |= set() if name.startswith("__") else self._name_files(module, name, set())
            files |= set() if attributes else self._package_files(module)
        return files

    def _name_files(self, module: str, name: str, attributes: set[str]) -> set[Path]:
        """Files that `from module import name` imports."""
        if f"{module}.{name}" in self.modules:
            return self._module_files(f"{module}.{name}", attributes)
        files = self._module_files(module, {"__name__"})
        if module in self.modules and self._is_lazy(module) and not name.startswith("__"):
            origin = self._stub(module).get(name)
            files |= (
                self._name_files(*origin, attributes)
                if origin and origin != (module, name)
                else self._package_files(module)
            )
        return files

    def _package_files(self, package: str) -> set[Path]:
        return {path for name, path in self.modules.items() if f"{name}.".startswith(f"{package}.")}

    def _is_lazy(self, package: str) -> bool:
        path = self.modules[package]
        if path.name != "__init__.py" or not path.exists():
            return False
        return path.with_suffix(".pyi").exists() or bool(re.search(r"__getattr__|lazy", path.read_text()))

    def _stub(self, package: str) -> dict[str, tuple[str, str]]:  # name -> module that defines it, and name there
        stub = self.modules[package].with_suffix(".pyi")
        imports = [node for node in ast.walk(_tree(stub)) if isinstance(node, ast.ImportFrom)]
        pairs = [(_absolute_name(node, package), alias) for node in imports for alias in node.names]
        return {alias.asname or alias.name: (module, alias.name) for module, alias in pairs}

    def data_package(
        self,
        path: Path,
    ) -> Path | None:
        """Folder of the package whose data files include a file; None for a module, and outside packages."""
        if path in self.modules.values() or path.suffix == ".pyi":
            return None
        folders = {module.parent: module.parent for module in self.modules.values() if module.name == "__init__.py"}
        folders |= self._data_folders
        return next((folders[folder] for folder in path.parents if folder in folders), None)


def _data(root: Path, modules: dict[str, Path]) -> list[tuple[str, str]]:
    """Data folders that setuptools puts into a package, each with the package that uses it."""
    with suppress(OSError, ValueError):
        setuptools = tomllib.loads((root / "pyproject.toml").read_text()).get("tool", {}).get("setuptools", {})
        owners = {folder: name.rpartition(".")[0] for name, folder in setuptools.get("package-dir", {}).items()}
        return [(folder, package) for folder, package in owners.items() if package in modules]
    return []


def _module_name(path: Path) -> str:  # path relative to the project
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "src" and len(parts) > 1 else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _absolute_name(node: ast.ImportFrom, package: str) -> str:
    """Absolute name of the module of a relative import."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _tree(path: Path) -> ast.Module:
    """Syntax tree of a file; empty for a file that is not code."""
    if not path.is_file() or path.suffix not in (".py", ".pyi", ".ipynb"):
        return ast.Module([], [])
    if path.suffix != ".ipynb":
        return _parsed(path.read_text(encoding="utf-8")) or ast.Module([], [])
    from IPython.core.inputtransformer2 import TransformerManager

    cells = [cell["source"] for cell in read_notebook(path)["cells"] if cell["cell_type"] == "code"]
    trees = [_parsed(cell) or _parsed(TransformerManager().transform_cell(cell)) for cell in cells]
    return ast.Module([statement for tree in trees if tree for statement in tree.body], [])


def _parsed(code: str) -> ast.Module | None:  # None for code that is not Python, which imports nothing
    with suppress(SyntaxError):
        return ast.parse(code)
    return None


def _used_attributes(nodes: list[ast.AST]) -> dict[str, set[str]]:
    """Attributes used of each name, with `*` for a name that is also used in another way."""
    attributes, uses = defaultdict(set), Counter(node.id for node in nodes if isinstance(node, ast.Name))
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes[node.value.id].add(node.attr)
            uses[node.value.id] -= 1
    for name in +uses:
        attributes[name].add("*")
    return attributes


def _executed_nodes(tree: ast.AST) -> list[ast.AST]:
    """Nodes that are executed: no docstrings, no imports for type checkers."""
    nodes = [tree]
    for node in nodes:  # the list grows during the iteration
        match node:
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                nodes += node.orelse
            case ast.Expr(value=ast.Constant()):
                pass
            case _:
                nodes += ast.iter_child_nodes(node)
    return nodes


def _git(root: Path, *arguments: str) -> set[Path]:
    """Files that git lists."""
    result = subprocess.run(["git", "-C", root, *arguments, "-z"], capture_output=True, text=True)
    if result.returncode:
        raise InputError(f"Expected a git repository and a revision in it; git says: {result.stderr.strip()}")
    return {root / name for name in result.stdout.split("\0") if name}


def changed_files(
    root: Path,  # the project's folder
    base: str = "HEAD",  # revision
) -> set[Path]:
    """Files that differ from a revision, untracked and deleted ones among them; raises InputError."""
    tracked = _git(root, "diff", "--name-only", "--no-renames", "--relative", base)
    return tracked | _git(root, "ls-files", "--others", "--exclude-standard")


def affected(
    notebooks: Iterable[Path],
    changed: set[Path],  # from `changed_files`
    root: Path,  # the project's folder
) -> list[Path]:
    """Notebooks that have changed, or depend on a file that has changed."""
    if any(path.name in AFFECTS_ALL for path in changed):
        return list(notebooks)
    files = _git(root, "ls-files", "--cached", "--others", "--exclude-standard") | changed
    graph = ImportGraph(root, files)
    stubs = {path.with_suffix(".py") for path in changed if path.suffix == ".pyi"}
    packages = {graph.data_package(path) for path in changed} - {None}
    data_users = {path for path in graph.modules.values() if path.parent in packages}
    return [path for path in notebooks if graph.imports(path) & (changed | stubs | data_users)]


def any_imports(
    notebooks: Sequence[Path],
    packages: Iterable[str],  # third-party packages, for example tensorflow
    root: Path,  # the project's folder
) -> bool:
    """Whether any notebook imports one of these packages, directly or indirectly; True without a git repository."""
    pattern = re.compile(rf"(?:^|\\n)[ \"]*(?:import|from) +(?:{'|'.join(packages)})\b", re.MULTILINE)  # in JSON, too

    def matches(paths: Iterable[Path]) -> bool:
        return any(pattern.search(path.read_text(encoding="utf-8")) for path in paths)

    if matches(notebooks):
        return True
    try:
        graph = ImportGraph(root, _git(root, "ls-files", "--cached", "--others", "--exclude-standard"))
    except InputError:
        return True
    files = set().union(*map(graph.imports, notebooks))
    return matches(path for path in files if path.suffix == ".py" and path.is_file())
