"""Which part of the package may import what: arrows point one way, from the MONAI shell to the torch core."""

import ast
import re
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import monai_drdm

ROOT = Path(monai_drdm.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))

CORE = {
    "fields": {"fields"},
    "networks": {"fields", "networks", "documents", "lazy_names"},
    "diffusion": {"fields", "networks", "diffusion"},
    "metrics": {"fields", "metrics"},
    "deformation": {"fields", "networks", "diffusion", "metrics", "deformation", "documents", "_version"},
}
"""What each part of the core may import of this package."""

PUBLIC = set(monai_drdm.__all__)
"""Names that are imported from the top."""

COMMAND_LINE = {"cli", "commands", "demonstration", "augment"}

MAX_LINES = 40
MAX_PARAMETERS = 12
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

FOREIGN = {
    "monai": {"samples", "transforms", "bank", "demonstration", "augment", "io", "training", "train", "registration"},
    "ignite": {"training"},
    "nibabel": {"io", "demonstration"},
    "SimpleITK": {"io"},
    "matplotlib": {"viz"},
}
"""Who may import another package."""


def part_of(path):
    """The sub-package, or the module at the top, that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def imports(path):
    """Dotted names of all modules that a file imports, also inside functions."""
    return tuple(_imports(path))


def _imports(path):
    package = ["monai_drdm", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if module == "monai_drdm":
                yield from (f"{module}.{alias.name}" for alias in node.names)


def own_parts(path):
    return {name.split(".")[1] for name in imports(path) if name.startswith("monai_drdm.")}


def foreign_packages(path):
    return {name.split(".")[0] for name in imports(path)} - {"monai_drdm"} - set(sys.stdlib_module_names)


def test_the_whole_package_is_looked_at():
    assert {part_of(path) for path in MODULES} >= {*CORE, "transforms", "io", "viz", "cli"}
    fields = {name for path in MODULES if part_of(path) == "fields" for name in foreign_packages(path)}
    assert "torch" in fields
    assert own_parts(ROOT / "diffusion" / "model.py") >= {"fields", "networks"}


def test_core_imports_inwards_only():
    for path in MODULES:
        if part_of(path) in CORE:
            assert own_parts(path) <= CORE[part_of(path)], path
            assert "monai_drdm" not in set(imports(path)), (
                f"{path}: import from a sub-package, not from the top, whose names bring the shell with them"
            )


def test_the_table_of_layers_is_in_the_order_of_imports():
    """A part imports what stands above it in CONTRIBUTING.md, or in the same row."""
    text = (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| folder of `monai_drdm/` |")[1].split("\n\n")[0]
    rows = [re.findall(r"`([a-z_]+)(?:/|\.py)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    place = {name: number for number, names in enumerate(rows) for name in names}
    assert len(rows) == len(set(place.values()))
    for path in MODULES:
        if (own := part_of(path)) not in ("__init__", "__main__"):
            late = {one for one in own_parts(path) if one in place and place[one] > place[own]}
            assert not late, (path, late)
            assert own_parts(path) <= {*place, *PUBLIC}, path


def test_fields_need_torch_only():
    for path in MODULES:
        if part_of(path) == "fields":
            assert foreign_packages(path) <= {"torch", "einops"}, path


def test_foreign_packages_stay_where_they_belong():
    for path in MODULES:
        for name, allowed in FOREIGN.items():
            assert name not in foreign_packages(path) or part_of(path) in allowed, path


def test_nothing_but_the_command_line_imports_it():
    for path in MODULES:
        if part_of(path) not in COMMAND_LINE:
            assert not own_parts(path) & COMMAND_LINE, path


def calls(path):
    """The functions that a file calls, as they are written."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_json_and_yaml_are_read_in_one_place():
    """Where every fault of a text is explained."""
    parsers = {"json.load", "json.loads", "yaml.load", "yaml.safe_load", "load_decathlon_datalist"}
    assert {part_of(path) for path in MODULES if calls(path) & parsers} == {"documents"}


def test_trainings_stand_side_by_side_on_one_floor():
    for path in MODULES:
        if part_of(path) == "training":
            assert own_parts(path) <= {"training", "fields", "io", "viz", "documents"}, path
        elif part_of(path) in {"train", "registration"}:
            assert own_parts(path) & {"train", "registration"} <= {part_of(path)}, path
        else:
            assert "training" not in own_parts(path), path


def module_name(path):
    parts = ["monai_drdm", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements_that_run(node):
    """All statements below a node, also inside functions, except those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from statements_that_run(child)


def imported_modules(tree, modules):
    """Those of some modules that a file imports; that a submodule runs its package's ``__init__`` does not count."""
    for node in statements_that_run(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & modules
            if names - modules and node.module in modules:
                yield node.module


def check_no_circles(sources):
    """Raise ``CycleError`` if modules, given as a dictionary of their source code, import each other in a circle."""
    graph = {name: set(imported_modules(ast.parse(text), set(sources))) - {name} for name, text in sources.items()}
    TopologicalSorter(graph).prepare()


def test_no_modules_import_each_other_in_a_circle():
    check_no_circles({module_name(path): path.read_text(encoding="utf-8") for path in MODULES})


def test_circles_are_found_inside_functions_and_not_in_imports_for_type_checkers():
    back = "if TYPE_CHECKING:\n    from p.a import x\n"
    check_no_circles({"p": "", "p.a": "from p import b", "p.b": back})
    with pytest.raises(CycleError):
        check_no_circles({"p": "", "p.a": "from p import b", "p.b": "def f():\n    from p.a import x\n"})


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, FUNCTIONS)]


def test_functions_stay_short():
    """Concepts cut files; what must stay small is what is read at once. Docstrings do not count."""
    for path in MODULES:
        for node in functions(path):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert length <= MAX_LINES, f"{path}:{node.lineno} {node.name} has {length} lines"


def test_functions_take_few_parameters():
    for path in MODULES:
        for node in functions(path):
            names = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= MAX_PARAMETERS, f"{path}:{node.lineno} {node.name} takes {count} parameters"
