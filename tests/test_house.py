"""The house rules, held from the syntax tree (docs/design.md, "The house")."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

from kachery_fast.config import SETTINGS

PACKAGE = Path(__file__).parent.parent / "src" / "kachery_fast"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)
CYTHON = sorted(PACKAGE.rglob("*.pyx"))

MODULE_LINES_MAX = 400
FUNCTION_LINES_MAX = 70
# Longer than the rule allows, each with its reason in docs/design.md.
LONG_MODULES = frozenset({"_chunker.pyx"})

# Floors: a room imports only from floors below its own; rooms on one floor never import each other.
FLOORS = {
    "errors": 1, "config": 1, "setting": 1, "_version": 1, "_core": 1, "_chunker": 1, "_checksum": 1, "splice": 1,
    "protocol": 2,
    "store": 3, "net": 3, "embedded": 3,
    "client": 4, "node": 4, "hub": 4,
    "cli": 5,
    "__init__": 6, "__main__": 6,
}
PURE = {
    "__future__", "base64", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq",
    "itertools", "json", "math", "operator", "re", "types", "typing", "urllib", "cryptography", "msgspec", "rfc8785",
}
BANNED_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "shared", "lib"}


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports, wherever in it."""
    package = ["kachery_fast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def rooms_imported_by(path: Path) -> set[str]:
    parts = [name.split(".") for name in imports_of(path)]
    return {part[1] for part in parts if part[0] == "kachery_fast" and len(part) > 1}


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def each(paths: Sequence[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """One test of all these modules that names every one that breaks the rule."""
    def decorate(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            broken = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    broken.append(f"{name_of(path)}: {error}")
            assert not broken, "\n".join(broken)

        return test

    return decorate


# --- floors


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in [*MODULES, *CYTHON]} <= set(FLOORS)


@each(MODULES)
def test_imports_go_down_and_never_to_a_neighbour(path: Path) -> None:
    room = room_of(path)
    for imported in rooms_imported_by(path) - {room}:
        assert imported in FLOORS, f"{imported} is no room"
        if (room, imported) in (("config", "errors"), ("config", "setting"), ("setting", "errors")):
            continue  # within the ground floor, settings may fail with an error of the tree
        assert FLOORS[imported] < FLOORS[room], f"{room} (floor {FLOORS[room]}) imports {imported}"


@each(MODULES)
def test_protocol_is_pure(path: Path) -> None:
    if room_of(path) != "protocol":
        return
    assert rooms_imported_by(path) <= {"protocol", "errors"}
    foreign = {name.split(".")[0] for name in imports_of(path)} - {"kachery_fast"}
    assert foreign <= PURE
    called = {node.func.id for node in ast.walk(tree_of(path))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"open", "print", "input", "eval", "exec", "__import__"}
    assert not any(isinstance(node, ast.Await | ast.AsyncFunctionDef | ast.Global) for node in ast.walk(tree_of(path)))


# --- size and shape


@each([*MODULES, *CYTHON])
def test_a_module_is_of_a_length_to_be_read(path: Path) -> None:
    if name_of(path) not in LONG_MODULES:
        assert len(path.read_text("utf-8").splitlines()) <= MODULE_LINES_MAX


def test_exceptions_are_reasoned_and_still_needed() -> None:
    for name in LONG_MODULES:
        assert name in (PACKAGE.parent.parent / "docs" / "design.md").read_text("utf-8")
        assert len((PACKAGE / name).read_text("utf-8").splitlines()) > MODULE_LINES_MAX


@each(MODULES)
def test_a_function_is_of_a_length_to_be_read(path: Path) -> None:
    long = {f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in functions_of(tree_of(path))
            if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX}
    assert not long


@each([*MODULES, *CYTHON])
def test_a_module_is_named_after_what_it_is_about(path: Path) -> None:
    assert not {path.stem.strip("_"), *path.relative_to(PACKAGE).parent.parts} & BANNED_NAMES


@each(MODULES)
def test_no_star_imports_and_an_explicit_list_of_public_names(path: Path) -> None:
    tree = tree_of(path)
    assert not any(isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
                   for node in ast.walk(tree))
    body = [node for node in tree.body if not isinstance(node, ast.Expr | ast.ImportFrom | ast.Import)]
    if path.stem == "__main__" or not body:
        return  # nothing is defined here
    lists = [node for node in tree.body
             if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign)
             and any(isinstance(target, ast.Name) and target.id == "__all__" for target in (
                 node.targets if isinstance(node, ast.Assign) else [node.target]))]
    assert lists, "it has no __all__"
    names = [element.value for node in lists if isinstance(node.value, ast.List | ast.Tuple)
             for element in node.value.elts if isinstance(element, ast.Constant)]
    assert len(names) == len(set(names))
    defined = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined |= {node.name for node in tree.body
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)}
    defined |= {alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom | ast.Import)
                for alias in node.names}
    lazy = {"__getattr__"} <= {node.name for node in functions_of(tree)}
    assert lazy or set(names) <= defined, set(names) - defined


@each(MODULES)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    tree = tree_of(path)
    assert ast.get_docstring(tree), "the module has none"
    bare = []
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            bare.append(node.name)
        if isinstance(node, ast.ClassDef) and not inherits_documentation(node):
            bare += [f"{node.name}.{method.name}" for method in node.body
                     if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
                     and not method.name.startswith("_") and not ast.get_docstring(method)]
    assert not bare


def inherits_documentation(node: ast.ClassDef) -> bool:
    """Whether the class fills in an interface that carries the documentation: one named in its bases or docstring."""
    return bool(node.bases) or node.name.startswith(("Http", "Memory", "Ably", "Nats"))


@each(MODULES)
def test_only_the_command_line_prints(path: Path) -> None:
    if room_of(path) in ("cli", "__main__"):
        return
    for node in ast.walk(tree_of(path)):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        assert not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys"
                    and node.attr in ("stdout", "stderr"))


@each(MODULES)
def test_loggers_are_named_after_their_room(path: Path) -> None:
    room = room_of(path)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "getLogger":
            (argument,) = node.args
            assert isinstance(argument, ast.Constant), "a logger's name is a word, not an expression"
            name = str(argument.value)
            if name.startswith("kachery_fast"):
                assert name.split(".")[1:2] in ([room], []), name
            else:  # a foreign logger may be quieted, not used
                assert room in ("cli", "net", "node", "hub", "embedded"), name


@each(MODULES)
def test_annotations_are_not_evaluated(path: Path) -> None:
    tree = tree_of(path)
    defines = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.AnnAssign
    if any(isinstance(node, defines) for node in tree.body):
        assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)


# --- settings and errors are used


def attributes_and_strings() -> set[str]:
    found: set[str] = set()
    for path in MODULES:
        if path.stem == "config" and path.parent == PACKAGE:
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_every_setting_is_read_somewhere() -> None:
    limits = {field.target.id for name in ("protocol/asking.py", "protocol/provide.py") for node in
              ast.walk(tree_of(PACKAGE / name)) if isinstance(node, ast.ClassDef) and node.name.endswith("Limits")
              for field in node.body if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)}
    native = "".join(path.read_text("utf-8") for path in CYTHON)  # which reads the environment itself
    unread = {setting.name for setting in SETTINGS if setting.env not in native} - attributes_and_strings() - limits
    assert not unread


def test_every_error_is_raised_somewhere() -> None:
    classes = {node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
               for path in MODULES if room_of(path) == "errors"
               for node in tree_of(path).body if isinstance(node, ast.ClassDef)}
    bases = {base for names in classes.values() for base in names}
    made: set[str] = set()
    for path in MODULES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                made.add(node.func.id)
            elif isinstance(node, ast.Call):  # handed to what raises it, such as a table of statuses
                made |= {argument.id for argument in node.args if isinstance(argument, ast.Name)}
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name):
                made.add(node.exc.id)
    for path in CYTHON:
        made |= {name for name in classes if f"{name}(" in path.read_text("utf-8")}
    unused = {name for name in classes if not name.startswith("_")} - made - bases
    assert not unused
